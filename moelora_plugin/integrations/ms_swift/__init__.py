"""ms-swift: `--tuner_type moelora`, `--optimizer gradamw` and `--moelora_*` options.

swift has tables for tuners and optimizers, which we fill. Options need more: its command line knows
only the fields of its argument dataclasses, so a subclass takes the place of the one that all
training arguments inherit, before they are defined. Only the import hooks are early enough for it;
where a file given to `--external_plugins` does the work, options come through `model_kwargs`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any


def register() -> None:
    """All that can be done once swift reads its plugin files.

    Raises:
        MissingDependencyError: PEFT's or transformers' tables cannot be extended.
        ConfigError: the command line holds options that swift has no fields for now.
    """
    from ... import registration
    from .arguments import refuse_unreadable_options

    refuse_unreadable_options()
    registration.register()
    registration.register_optimizers()
    registration.register_callbacks()
    register_tuner()
    register_comparison()
    register_engine()
    register_optimizers()


def register_tuner() -> None:
    """Make swift know `tuner_type: moelora`."""
    from swift.tuner_plugin.mapping import tuners_map

    from .arguments import TUNER_TYPE
    from .tuner import MoeLoraTuner

    tuners_map.setdefault(TUNER_TYPE, MoeLoraTuner)


def register_comparison() -> None:
    """Make swift's training commands compare a run with the adapter that it goes on from.

    Where swift loads one, it tells the tuner nothing of the run.
    """
    from swift.pipelines.train.tuner import TunerMixin

    from .tuner import refuse_other_adapter

    prepare = TunerMixin.prepare_model.__func__
    if hasattr(prepare, "moelora"):
        return

    @functools.wraps(prepare)
    def prepare_compared(cls: Any, args: Any, model: Any, **keywords: Any) -> Any:
        refuse_other_adapter(args, model)
        return prepare(cls, args, model, **keywords)

    prepare_compared.moelora = True  # type: ignore[attr-defined]
    TunerMixin.prepare_model = classmethod(prepare_compared)  # type: ignore[arg-type]


def register_optimizers() -> None:
    """Make swift know `optimizer: gradamw` and its sisters."""
    from swift.optimizers.mapping import optimizers_map

    from ...optim import OPTIMIZERS
    from .optimizers import optimizer_callback

    for name in OPTIMIZERS:
        optimizers_map.setdefault(name, optimizer_callback(name))


def register_options() -> None:
    """Make swift's training commands read `--moelora_*`."""
    from swift.arguments import tuner_args

    from .arguments import MoeLoraTunerArguments

    tuner_args.TunerArguments = MoeLoraTunerArguments


def register_engine() -> None:
    """Make swift's own engine look at the adapters that it is given by name (`swift deploy`)."""
    from swift.infer_engine.transformers_engine import TransformersEngine

    from ...checkpoint import MANIFEST_FILE
    from ..options import verify_adapter

    add = TransformersEngine._add_adapter
    if hasattr(add, "moelora"):
        return

    @functools.wraps(add)
    def add_verified(engine: Any, adapter_path: str, *args: Any, **keywords: Any) -> Any:
        if (Path(adapter_path) / MANIFEST_FILE).is_file():
            verify_adapter(Path(adapter_path))
        return add(engine, adapter_path, *args, **keywords)

    add_verified.moelora = True  # type: ignore[attr-defined]
    TransformersEngine._add_adapter = add_verified
