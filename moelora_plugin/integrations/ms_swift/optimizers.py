"""swift's interface to an optimizer."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from swift.optimizers.base import OptimizerCallback
from transformers.training_args import OptimizerNames

from ...errors import ConfigError
from .arguments import refuse_optimizer_conflicts


def optimizer_callback(name: str) -> type[Any]:
    """What swift builds for `--optimizer NAME`: from there on, the same as `--optim NAME`."""

    class MoeLoraOptimizerCallback(OptimizerCallback):  # type: ignore[misc]
        def __init__(self, args: Any, trainer: Any) -> None:
            default = next(f.default for f in fields(args) if f.name == "optim")
            if args.optim not in (default, name):
                raise ConfigError(
                    f"optimizer is {name!r} and optim is {str(args.optim.value)!r}; remove one."
                )
            refuse_optimizer_conflicts(args)
            args.optim = OptimizerNames(name)
            super().__init__(args, trainer)

    return MoeLoraOptimizerCallback
