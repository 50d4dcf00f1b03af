"""Which experts a model uses, counted over real tokens only.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..call import read_call
from ..model import routed_layers
from ..types import Routing


@dataclass
class LayerCounts:
    """Running sums for one layer.

    Attributes:
        tokens: tokens counted: not padding, and with finite gates.
        selected_E: how often each expert was selected.
        weight_E: sum of each expert's gates.
        entropy: sum over tokens of the entropy of the probabilities, in nats.
        not_finite: tokens left out because their gates are NaN or infinite.
    """

    tokens: int = 0
    selected_E: Tensor = field(default_factory=lambda: torch.zeros(0))
    weight_E: Tensor = field(default_factory=lambda: torch.zeros(0))
    entropy: float = 0.0
    not_finite: int = 0

    def add(self, routing: Routing, real_T: Tensor | None) -> None:
        """Count one forward pass; `real_T` is True where the token is not padding."""
        # On the CPU, because not every accelerator has float64.
        probs_TE, weights_TE = routing.probs.cpu(), routing.weights.cpu()
        if real_T is not None:
            real_T = real_T.cpu()
            probs_TE, weights_TE = probs_TE[real_T], weights_TE[real_T]
        finite_T = weights_TE.isfinite().all(-1)
        self.not_finite += int((~finite_T).sum())
        probs_TE, weights_TE = probs_TE[finite_T].double(), weights_TE[finite_T].double()
        if not self.tokens:
            self.selected_E = self.weight_E = torch.zeros(weights_TE.shape[-1], dtype=torch.double)
        self.tokens += len(weights_TE)
        self.selected_E = self.selected_E + (weights_TE > 0).sum(0)
        self.weight_E = self.weight_E + weights_TE.sum(0)
        self.entropy += float(torch.special.entr(probs_TE).sum())

    def summary(self) -> dict[str, Any]:
        """Means per token; see `RoutingStatistics.to_dict`."""
        count = max(self.tokens, 1)
        return {
            "tokens": self.tokens,
            "load": (self.selected_E / max(float(self.selected_E.sum()), 1.0)).tolist(),
            "weight": (self.weight_E / count).tolist(),
            "entropy": self.entropy / count,
            "not_finite": self.not_finite,
        }


class RoutingStatistics:
    """What `routing_statistics` collected, per layer.

    Attributes:
        layers: counts by layer name, in model order.
    """

    def __init__(self) -> None:
        self.layers: dict[str, LayerCounts] = {}

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """JSON-safe, per layer.

        tokens: tokens counted. load: each expert's share of the selections, summing to 1. weight:
            each expert's mean gate, summing to 1. entropy: mean entropy of the probabilities over
            all experts in nats (log E is uniform). not_finite: tokens with NaN or infinite gates,
            left out of the rest.
        """
        return {name: counts.summary() for name, counts in self.layers.items()}


@contextmanager
def routing_statistics(model: nn.Module, adapter: str = "default") -> Iterator[RoutingStatistics]:
    """Record which experts `model` uses inside the block.

        with routing_statistics(model) as stats:
            model(**batch)
        stats.to_dict()

    Padding is left out: the attention mask of each call to the base model is found by name among
    its arguments. A recomputation under activation checkpointing is not counted twice, because the
    counts are taken when the model's forward returns. Works through `generate` as well. A layer
    that runs several times in one forward is counted for the last of them.

    Args:
        model: a model with MoE-LoRA layers, wrapped or not.
        adapter: whose routers.
    """
    layers = routed_layers(model)
    stats = RoutingStatistics()
    base = _base_of(model)

    def forget(module: nn.Module, args: Any) -> None:
        # What a recomputation or a forward that failed has left behind.
        for layer in layers.values():
            layer.last_routing.clear()

    def count(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        call = read_call(module, args, kwargs, {})
        for name, layer in layers.items():
            routing = layer.last_routing.pop(adapter, None)
            if routing is not None:
                counts = stats.layers.setdefault(name, LayerCounts())
                counts.add(routing, call.real_among(len(routing.weights)))

    handles = (
        base.register_forward_pre_hook(forget),
        base.register_forward_hook(count, with_kwargs=True),
    )
    for layer in layers.values():
        layer.record_routing = True
    try:
        yield stats
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            layer.record_routing = False
            layer.last_routing.clear()


def _base_of(model: nn.Module) -> nn.Module:
    """The module whose forward every call goes through, `generate` included."""
    get_base_model = getattr(model, "get_base_model", None)
    base: nn.Module = get_base_model() if callable(get_base_model) else model
    return base
