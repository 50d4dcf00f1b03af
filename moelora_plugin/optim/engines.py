"""Parallel engines that a Riemannian optimizer cannot work under, and the way that does."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import ConfigError

_ZERO_3 = (
    "ZeRO stage 3 partitions the experts' factors, so no process can take their Riemannian "
    "metrics; use ZeRO stage 1 or 2 with in_backward, or DDP, or FSDP2."
)
_ZERO = (
    "DeepSpeed flattens the parameters, so an optimizer no longer sees the experts; set "
    "in_backward=true and gate_max_grad_norm=null (in optim_args or as arguments of "
    "build_optimizer) with ZeRO stage 1 or 2, or use DDP or FSDP2."
)
_FSDP_1 = (
    "FSDP version 1 flattens the parameters, so an optimizer no longer sees the experts; use "
    "FSDP2 (fsdp_version: 2) or DDP."
)
_FSDP_2_IN_BACKWARD = (
    "FSDP replaces the parameters, so gradients cannot be preconditioned in the backward; remove "
    "in_backward: under FSDP2 the optimizer itself does it."
)


def refuse_unsupported_engine(model: nn.Module, in_backward: bool) -> None:
    """Stop where the engine that will run the training would break the optimizer.

    The engine is read off the parameters and, before it has touched them, off accelerate's state.

    Args:
        model: what is going to train.
        in_backward: whether the gradients are preconditioned in the backward.

    Raises:
        ConfigError: DeepSpeed with the optimizers of their own, ZeRO stage 3, FSDP version 1, or
            FSDP with `in_backward`.
    """
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ConfigError(_ZERO_3)
    state = _accelerate_state()
    deepspeed = getattr(state, "deepspeed_plugin", None)
    if deepspeed is not None:
        if deepspeed.zero_stage == 3:
            raise ConfigError(_ZERO_3)
        if not in_backward:
            raise ConfigError(_ZERO)
    fsdp = getattr(state, "fsdp_plugin", None)
    if fsdp is not None:
        if getattr(fsdp, "fsdp_version", 1) != 2:
            raise ConfigError(_FSDP_1)
        if in_backward:
            raise ConfigError(_FSDP_2_IN_BACKWARD)
    if in_backward and any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise ConfigError(_FSDP_2_IN_BACKWARD)


def _accelerate_state() -> Any:
    """Accelerate's state where a program has set it up (transformers' Trainer does), else None."""
    from accelerate.state import AcceleratorState, is_initialized

    return AcceleratorState() if is_initialized() else None
