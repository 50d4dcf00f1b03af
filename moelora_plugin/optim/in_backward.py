"""Riemannian preconditioning inside the backward, for optimizers that are not ours.

A hook on each expert factor preconditions its gradient before it is accumulated, so whatever steps
afterwards (torch's AdamW, an 8-bit one, DeepSpeed's) sees preconditioned gradients. Preconditioning
is linear in the gradient and the metrics are those of the current weights, so accumulation over
micro-batches, averaging over processes and a loss scale commute with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import ConfigError
from ..ops.precondition import damped_inverses, metric_of, precondition
from ..types import ExpertPair
from .engines import refuse_unsupported_engine
from .groups import FrozenFactor, frozen_factor, pairs_by_module, pairs_of
from .riemannian import check_damping, warn_of_escalation

# Which parameters are preconditioned, and by whom: hooks must neither be doubled nor be lost.
_HOOKED: Any = WeakTensorKeyDictionary()


class PreconditioningHandle:
    """The hooks that one call of `precondition_in_backward` has put on a model."""

    def __init__(self) -> None:
        self._hooks: list[Any] = []

    def _add(
        self, module: nn.Module, name: str, pair: ExpertPair, damping: float, scale: float
    ) -> None:
        frozen = frozen_factor(module, pair)
        for side, learner, partner in (("a", pair.a, pair.b), ("b", pair.b, pair.a)):
            if learner.requires_grad:
                source = partner if frozen is None else frozen
                hook = _preconditioner(pair, name, side, source, damping, scale)
                self._hooks.append(learner.register_hook(hook))
                _HOOKED[learner] = self
        self._hooks.append(module.register_forward_pre_hook(_check_hooked))

    def remove(self) -> None:
        """Take the hooks off: the gradients are ordinary ones again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for parameter in [p for p, handle in _HOOKED.items() if handle is self]:
            del _HOOKED[parameter]


def precondition_in_backward(
    model: nn.Module, *, damping: float = 1e-6, scale_compensation: bool = False
) -> PreconditioningHandle:
    """Make every backward of `model` leave preconditioned gradients on its experts (eq. 6).

    For optimizers that are not ours and for engines that flatten parameters (DeepSpeed ZeRO, stage
    1 and 2). Both metrics are taken from the weights before the step ("jacobi"). Whatever clips
    gradients afterwards clips the preconditioned ones. A second call replaces the first.

    Args:
        model: a PeftModel (or any module) with MoE-LoRA or LoRA layers, in its final dtype.
        damping: added to the metrics' diagonal, in the unit of squared factor entries.
        scale_compensation: divide the preconditioned gradients by the squared LoRA scale.

    Returns:
        A handle whose `remove()` takes the hooks off.

    Raises:
        ConfigError: no trainable experts, a negative damping, or an engine under which the hooks
            would not run (FSDP, ZeRO stage 3).
    """
    check_damping(damping)
    refuse_unsupported_engine(model, in_backward=True)
    remove_preconditioning(model)
    handle = PreconditioningHandle()
    names = {id(module): name for name, module in model.named_modules()}
    for module, pairs in pairs_by_module(model):
        for pair in pairs:
            scale = pair.scaling**-2 if scale_compensation else 1.0
            handle._add(module, names[id(module)], pair, damping, scale)
    return handle


def remove_preconditioning(model: nn.Module) -> None:
    """Take off every hook that earlier calls have put on parameters of `model`."""
    for parameter in model.parameters():
        if parameter in _HOOKED:
            _HOOKED[parameter].remove()


def _preconditioner(
    pair: ExpertPair,
    name: str,
    side: str,
    partner: Tensor | FrozenFactor,
    damping: float,
    scale: float,
) -> Callable[[Tensor], Tensor]:
    """A tensor hook: the gradient of one factor, times the inverse metrics of its partner."""
    ranks, shared = pair.ranks, pair.shared

    def hook(grad: Tensor) -> Tensor:
        # A backward inside an autocast block would round the metrics.
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            factor = partner() if isinstance(partner, FrozenFactor) else partner
            metric = metric_of(factor.detach(), side, ranks, shared)
            try:
                (inverse,), escalated = damped_inverses([metric], damping)
            except FloatingPointError as error:
                raise FloatingPointError(f"{error} Its layer is {name}.") from error
            warn_of_escalation(escalated, damping)
            return precondition(inverse * scale, grad, side, ranks, shared)

    return hook


def _check_hooked(module: nn.Module, _args: Any) -> None:
    """Stop where an engine has replaced the parameters: their gradients would be ordinary ones."""
    if not (module.training and torch.is_grad_enabled()):
        return
    for pair in pairs_of(module):
        for parameter in (factor for factor in (pair.a, pair.b) if factor.requires_grad):
            if parameter not in _HOOKED or hasattr(parameter, "ds_id"):
                raise ConfigError(
                    "Expert parameters were replaced, added or partitioned after "
                    "precondition_in_backward, so their gradients would not be preconditioned; "
                    "call it after that, and under FSDP2 use build_optimizer without in_backward."
                )
