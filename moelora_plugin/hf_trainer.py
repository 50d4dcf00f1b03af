"""Our optimizers as transformers' Trainer asks for them: `optim: gradamw`, `optim_args: ...`.

TrainingArguments' own keys keep their meaning: `learning_rate`, `weight_decay`, `adam_beta1`,
`adam_beta2`, `adam_epsilon`. `optim_args` holds what only we have.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from torch import nn
from torch.optim import Optimizer

from .errors import ConfigError
from .lookup import unknown_key_message
from .optim import OPTIMIZERS, RiemannianAdamW, build_optimizer

_SET_BY = {
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
}


def handle_optimizer(context: Any) -> tuple[Callable[[], Callable[..., Optimizer]], dict[str, Any]]:
    """Answer transformers' `OptimizerContext` with a factory that gets the whole model.

    A class would only get two lists of parameters, without the pairing of A and B.

    Raises:
        ConfigError: `optim_args` holds an unknown key or a bad value.
    """
    args = context.args
    name = str(args.optim.value)
    keywords: dict[str, Any] = {
        "name": name,
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
    }
    if OPTIMIZERS[name].optimizer is RiemannianAdamW:
        keywords |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return OptimizerFactory, {**keywords, **optimizer_arguments(context.optim_args)}


class OptimizerFactory:
    """transformers calls it without arguments, then the instance with the model."""

    def __call__(self, model: nn.Module, *args: Any, **keywords: Any) -> Optimizer:
        """The optimizer; further positional arguments are axolotl's TrainingArguments."""
        return build_optimizer(model, **keywords)


def optimizer_arguments(
    options: Mapping[str, Any],
    *,
    source: str = "optim_args",
    set_by: Mapping[str, str] = _SET_BY,
) -> dict[str, Any]:
    """A host's options as keyword arguments of `build_optimizer`, numbers and booleans read.

    Args:
        options: values as the host has them, strings from `optim_args` among them.
        source: the host's key that holds them, for errors.
        set_by: parameters that the host has keys of its own for -> those keys.

    Raises:
        ConfigError: an unknown key (the nearest is offered), or one that has a key of its own.
    """
    parameters = inspect.signature(build_optimizer).parameters
    known = [
        key
        for key, parameter in parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and key not in set_by
    ]
    for key in options:
        if key in set_by:
            raise ConfigError(f"{source}: {key} is set by {set_by[key]}; remove it.")
        if key not in known:
            raise ConfigError(unknown_key_message(source, key, known))
    return {
        key: _value(source, key, value, parameters[key].default) for key, value in options.items()
    }


def _value(source: str, key: str, text: Any, default: Any) -> Any:
    """A string as the type of the parameter's default."""
    value = yaml.safe_load(text) if isinstance(text, str) else text
    if value in ("None", "none"):  # axolotl writes a YAML null as Python does
        value = None
    if isinstance(default, bool | str):
        right = isinstance(value, type(default))
    else:
        if isinstance(value, str):  # YAML takes 1e-4 for text
            try:
                value = float(value)
            except ValueError:
                value = text
        right = isinstance(value, int | float) and not isinstance(value, bool)
        right = right or (value is None and key == "gate_max_grad_norm")
    if not right:
        kind = {bool: "true or false", str: "a word"}.get(type(default), "a number")
        raise ConfigError(f"{source}: {key}={text!r} must be {kind}.")
    return value
