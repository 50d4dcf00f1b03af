"""How auxiliary losses reach training without a change to any host's loss.

The gradient enters in the layer: an identity on the layer's update carries coef * loss into the
graph, and its backward hands the loss the gradient that it would get as a summand of the total. So
it needs no cooperation of the code that computes the loss, survives activation checkpointing
(a recomputed layer enters its loss once, where the gradient passes), and DDP averages it over
processes like any other gradient.

No shape suffixes: an update is (T, O), a loss a scalar.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..lookup import check_options, lookup
from ..losses import LOSSES, AuxLoss, LossInput


@dataclass(frozen=True)
class WeightedLoss:
    """One auxiliary loss of an adapter."""

    name: str
    coefficient: float
    function: AuxLoss


def weighted_losses(coefficients: Mapping[str, Any]) -> tuple[WeightedLoss, ...]:
    """The losses of an adapter's `aux_losses`.

    Raises:
        ConfigError: an unknown name or option; the nearest are offered.
    """
    losses = []
    for name, value in coefficients.items():
        options = dict(value) if isinstance(value, Mapping) else {"coefficient": value}
        coefficient = float(options.pop("coefficient"))
        function = lookup("losses", name, LOSSES)
        check_options(f"aux_losses[{name!r}]", function, options)
        losses.append(WeightedLoss(name, coefficient, functools.partial(function, **options)))
    return tuple(losses)


class AuxLosses:
    """What the layers of one model share: how much a loss weighs.

    The total is coef * mean over the adapter's routed layers of the layer's loss, and with gradient
    accumulation the mean over the micro-batches of an update.

    Attributes:
        scale: what this micro-batch's losses are multiplied with in the gradient: one over the
            number of micro-batches in the update, times a loss scaler's factor. transformers'
            Trainer sets it through our callback; a training loop of one's own that accumulates
            gradients or scales its loss sets it as it scales that loss.
        num_layers: how many layers with a router an adapter has, by adapter name.
    """

    def __init__(self) -> None:
        self.scale: float = 1.0
        self.num_layers: dict[str, int] = {}

    def enter(
        self, update: Tensor, inputs: LossInput, losses: Sequence[WeightedLoss], adapter: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tie the losses of a layer to the gradient of its update.

        Args:
            update: the layer's update.
            inputs: the layer's routing and experts, with their graph.
            losses: the adapter's.
            adapter: its name.

        Returns:
            The update, and each loss before coefficient and scale, detached.
        """
        with torch.autocast(update.device.type, enabled=False):  # a half's matmul is too coarse
            values = {loss.name: loss.function(inputs) for loss in losses}
        total = sum(loss.coefficient * values[loss.name] for loss in losses)
        update = _Enter.apply(  # type: ignore[no-untyped-call]
            update, total * (self.scale / self.num_layers[adapter])
        )
        return update, {name: value.detach() for name, value in values.items()}


class _Enter(torch.autograd.Function):
    """Identity on the first argument; the second receives the gradient 1."""

    @staticmethod
    def forward(ctx: Any, update: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype, ctx.device = loss.dtype, loss.device
        return update.view_as(update)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), dtype=ctx.dtype, device=ctx.device)
