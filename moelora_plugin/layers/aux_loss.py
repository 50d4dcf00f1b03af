"""How auxiliary losses reach training without a change to any host's loss.

The gradient enters in the layer: an identity on the layer's update carries coef * loss into the
graph, and its backward hands the loss the gradient that it would get as a summand of the total. So
it needs no cooperation of the code that computes the loss, survives activation checkpointing
(a recomputed layer enters its loss once, where the gradient passes), and DDP averages it over
processes like any other gradient.

Shape suffixes: T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..lookup import lookup
from ..losses import LOSSES, AuxLoss
from ..types import Routing


@dataclass(frozen=True)
class WeightedLoss:
    """One auxiliary loss of an adapter."""

    name: str
    coefficient: float
    function: AuxLoss


def weighted_losses(coefficients: Mapping[str, float]) -> tuple[WeightedLoss, ...]:
    """The losses of an adapter's `aux_losses`.

    Raises:
        ConfigError: an unknown name; the nearest are offered.
    """
    return tuple(
        WeightedLoss(name, coefficient, lookup("losses", name, LOSSES))
        for name, coefficient in coefficients.items()
    )


class AuxLosses:
    """What the layers of one model share: which tokens count, and how much a loss weighs.

    The total is coef * mean over the adapter's layers of the layer's loss, and with gradient
    accumulation the mean over the micro-batches of an update.

    Attributes:
        scale: what this micro-batch's losses are multiplied with in the gradient: one over the
            number of micro-batches in the update, times a loss scaler's factor. transformers'
            Trainer sets it through our callback; a training loop of one's own that accumulates
            gradients or scales its loss sets it as it scales that loss.
        num_layers: how many layers an adapter has, by adapter name.
    """

    def __init__(self) -> None:
        self.scale: float = 1.0
        self.num_layers: dict[str, int] = {}
        self._real_T: Tensor | None = None
        self._watches = False

    def watch(self, model: nn.Module) -> None:
        """Learn from each training call of `model` which of its tokens are padding."""
        if not self._watches:
            model.register_forward_pre_hook(self._note_tokens, with_kwargs=True)
            self._watches = True

    def _note_tokens(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        # A reference model's or an evaluation's pass in between must not replace the mask that a
        # recomputation of the training pass will need.
        if module.training and torch.is_grad_enabled():
            self._real_T = real_tokens(module, args, kwargs)

    def enter(
        self, update_TO: Tensor, routing: Routing, losses: Sequence[WeightedLoss], adapter: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tie the losses of a layer's routing to the gradient of its update.

        Args:
            update_TO: the layer's update.
            routing: the layer's routing, with its graph.
            losses: the adapter's.
            adapter: its name.

        Returns:
            The update, and each loss before coefficient and scale, detached.
        """
        # Layers that see other tokens (a vision tower, a pooled sequence) have no mask.
        real_T = self._real_T
        if real_T is not None and len(real_T) != len(routing.weights):
            real_T = None
        values = {loss.name: loss.function(routing, real_T) for loss in losses}
        total = sum(loss.coefficient * values[loss.name] for loss in losses)
        update_TO = _Enter.apply(  # type: ignore[no-untyped-call]
            update_TO, total * (self.scale / self.num_layers[adapter])
        )
        return update_TO, {name: value.detach() for name, value in values.items()}


class _Enter(torch.autograd.Function):
    """Identity on the first argument; the second receives the gradient 1."""

    @staticmethod
    def forward(ctx: Any, update: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype, ctx.device = loss.dtype, loss.device
        return update.view_as(update)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), dtype=ctx.dtype, device=ctx.device)


def real_tokens(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Which of the T tokens of a call of `module` are no padding; None where no mask says so.

    The attention mask is found by name among the arguments. With a cache it covers the past as
    well: its last columns are the current tokens.
    """
    names = inspect.signature(module.forward).parameters
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    mask = arguments.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    inputs = (arguments.get(name) for name in ("input_ids", "inputs_embeds"))
    length = next((i.shape[1] for i in inputs if isinstance(i, Tensor)), mask.shape[1])
    return mask[:, mask.shape[1] - length :].bool().flatten()
