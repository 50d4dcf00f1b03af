"""The only file that touches globals of PEFT, transformers and lm-eval.

Everything here is safe to call any number of times.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, get_args

from .errors import MissingDependencyError
from .types import OptimizerName

_LM_EVAL_MODELS = {
    "moelora": "moelora_plugin.evaluation.lm.text:MoeLoraLM",
    "moelora-multimodal": "moelora_plugin.evaluation.lm.vision:VisionLM",
}


def register() -> None:
    """Make PEFT know the type MOELORA, its config and its tuner.

    Raises:
        MissingDependencyError: PEFT's enum cannot be extended.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils.peft_types import PeftType, register_peft_method

    # PEFT offers no way to register a type of one's own: `register_peft_method` demands a member of
    # the enum, and saving reads its `.value`. A plain string in the tables is not enough.
    _add_member(PeftType, "MOELORA", "MOELORA", "install a PEFT between 0.18.1 and 0.21.2")
    from .config import PEFT_TYPE, MoeLoraConfig
    from .model import MoeLoraModel

    # Keys are members of a str enum, which equal and hash as their plain names.
    if PEFT_TYPE not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(
            name=PEFT_TYPE.lower(), config_cls=MoeLoraConfig, model_cls=MoeLoraModel
        )
    register_generation()


def register_generation() -> None:
    """Have transformers' `generate` say where a prompt ends, to layers that decide by prompts."""
    from transformers.generation.utils import GenerationMixin

    from .generation import wrap_generation

    wrap_generation(GenerationMixin)


def register_block_keys() -> None:
    """Make transformers' own `load_adapter` find the routers of blocks.

    It puts the adapter's name behind the first part of a key that begins with PEFT's prefix. For
    the router of a block, `mlp.moelora_block.moelora_gate.weight`, that is one part too early.
    """
    for name in ("peft.utils.transformers_weight_conversion", "transformers.integrations.peft"):
        module: Any = sys.modules.get(name)
        build = vars(module).get("build_peft_weight_mapping") if module is not None else None
        if build is not None and not hasattr(build, "__wrapped__"):
            module.build_peft_weight_mapping = _with_block_keys(build)


def register_native_loading() -> None:
    """Make transformers' own `load_adapter` fit our adapters, and refuse damaged ones."""
    from transformers.integrations.peft import PeftAdapterMixin

    register_block_keys()
    load_adapter = PeftAdapterMixin.load_adapter
    if hasattr(load_adapter, "__wrapped__"):
        return

    @functools.wraps(load_adapter)
    def load_checked_adapter(self: Any, *args: Any, **keywords: Any) -> Any:
        from .native import refuse_damaged_load, tensors_before  # when one is loaded: imports PEFT

        before = tensors_before(self)
        loading_info = load_adapter(self, *args, **keywords)
        given = inspect.signature(load_adapter).bind(self, *args, **keywords).arguments
        refuse_damaged_load(self, given.get("adapter_name") or "default", loading_info, before)
        return loading_info

    setattr(PeftAdapterMixin, "load_adapter", load_checked_adapter)  # noqa: B010


def _with_block_keys(build: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    @functools.wraps(build)
    def build_peft_weight_mapping(
        weight_conversions: Any, adapter_name: str, peft_config: Any = None
    ) -> list[Any]:
        mapping = build(weight_conversions, adapter_name, peft_config=peft_config)
        if mapping and getattr(peft_config, "peft_type", None) == "MOELORA":
            from transformers.core_model_loading import WeightRenaming

            source = rf"moelora_block\.{re.escape(adapter_name)}\.(moelora_[^\.]*)"
            mapping.append(WeightRenaming(source, rf"moelora_block.\1.{adapter_name}"))
        return mapping

    return build_peft_weight_mapping


def register_optimizer_names() -> None:
    """Make transformers' TrainingArguments accept `optim="gradamw"` and its sisters.

    Raises:
        MissingDependencyError: transformers' enum cannot be extended.
    """
    from transformers.training_args import OptimizerNames

    for name in get_args(OptimizerName):
        _add_member(OptimizerNames, name.upper(), name, "install a transformers from 5.6 to 5.24")


def register_optimizers() -> None:
    """Make transformers' Trainer build our optimizers by their names.

    Raises:
        MissingDependencyError: this transformers has no table of optimizers.
    """
    from transformers import trainer_optimizer
    from transformers.training_args import OptimizerNames

    handlers = getattr(trainer_optimizer, "_OPTIMIZER_HANDLERS", None)
    if not isinstance(handlers, dict):
        raise MissingDependencyError(
            "This transformers has no table of optimizers, so optim cannot name ours; install a "
            "transformers from 5.6 to 5.24."
        )

    def handle(context: Any) -> Any:
        from .hf_trainer import handle_optimizer  # when a Trainer asks: it imports PEFT

        return handle_optimizer(context)

    register_optimizer_names()
    for name in get_args(OptimizerName):
        handlers.setdefault(OptimizerNames(name), handle)


def register_callbacks() -> None:
    """Give every transformers Trainer what our optimizers, losses and guards need of it."""
    from transformers import trainer, trainer_utils

    from .trainer_callbacks import AuxLossCallback, GuardCallback, OptimizerCallback

    callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
    ours = (AuxLossCallback, GuardCallback, OptimizerCallback)
    callbacks += [c for c in ours if c not in callbacks]
    train = trainer.Trainer.train
    if hasattr(train, "moelora"):
        return

    @functools.wraps(train)
    def train_as_before(
        self: Any, resume_from_checkpoint: Any = None, *args: Any, **keywords: Any
    ) -> Any:
        # The folder is known here alone, and its tensors are loaded before any callback is called.
        folder = resume_from_checkpoint
        if folder is True:
            last: Any = trainer_utils.get_last_checkpoint
            folder = last(self.args.output_dir)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, GuardCallback):
                callback.before_train(self.model, Path(folder) if folder else None)
        return train(self, resume_from_checkpoint, *args, **keywords)

    train_as_before.moelora = True  # type: ignore[attr-defined]
    setattr(trainer.Trainer, "train", train_as_before)  # noqa: B010


def register_lm_eval_models() -> None:
    """Make lm-eval's `--model` know ours, which are imported when they are asked for.

    Raises:
        MissingDependencyError: this lm-eval has no registry of models.
    """
    try:
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise MissingDependencyError(
            "This lm-eval has no registry of models, so --model cannot name ours; install "
            "lm-eval 0.4.13."
        ) from error
    for name, target in _LM_EVAL_MODELS.items():
        if name not in model_registry:
            model_registry.register(name, target=target)


def _add_member(enum: type[Enum], name: str, value: str, remedy: str) -> None:
    """Add a member to a string enum of another package."""
    if name in enum.__members__:
        return
    try:
        member = str.__new__(enum, value)  # type: ignore[type-var]
        member._name_ = name
        member._value_ = value
        enum._member_map_[name] = member
        enum._value2member_map_[value] = member
        enum._member_names_.append(name)
        type.__setattr__(enum, name, member)
    except (AttributeError, TypeError) as error:
        raise MissingDependencyError(
            f"The enum {enum.__name__} cannot be extended, so it cannot know {value}; {remedy}."
        ) from error
