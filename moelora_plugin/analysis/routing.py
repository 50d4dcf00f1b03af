"""Which experts a model uses, counted over real tokens only.

Shape suffixes: L layers, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..call.reading import named_arguments
from ..model import routed_layers
from ..types import Routing

_MASK = "attention_mask"


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

    def __add__(self, other: LayerCounts) -> LayerCounts:
        """The counts of both, for example of two processes."""
        return LayerCounts(
            self.tokens + other.tokens,
            self.selected_E + other.selected_E,
            self.weight_E + other.weight_E,
            self.entropy + other.entropy,
            self.not_finite + other.not_finite,
        )

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
def routing_statistics(
    model: nn.Module, adapter: str = "default", *, padding_id: int | None = None
) -> Iterator[RoutingStatistics]:
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
        padding_id: token id that calls without an attention mask pad with on the right; None takes
            all of their tokens for real.
    """
    layers = routed_layers(model)
    stats = RoutingStatistics()
    base = _base_of(model)

    def forget(module: nn.Module, args: Any) -> None:
        # What a recomputation or a forward that failed has left behind.
        for layer in layers.values():
            layer.last_routing.clear()

    def count(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        unpadded_T = None
        if padding_id is not None and named_arguments(module, args, kwargs).get(_MASK) is None:
            unpadded_T = _before_padding(args, kwargs, padding_id)
        found = {}
        for name, layer in layers.items():
            if (routing := layer.last_routing.pop(adapter, None)) is not None:
                real_T = layer.last_real.pop(adapter, None)
                is_unmasked = real_T is None and not layer.sees_images and unpadded_T is not None
                found[name] = routing, unpadded_T if is_unmasked else real_T
        for name, counts in _count(found).items():
            stats.layers[name] = stats.layers[name] + counts if name in stats.layers else counts

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
            layer.last_real.clear()


def _base_of(model: nn.Module) -> nn.Module:
    """The module whose forward every call goes through, `generate` included."""
    get_base_model = getattr(model, "get_base_model", None)
    base: nn.Module = get_base_model() if callable(get_base_model) else model
    return base


def _count(found: Mapping[str, tuple[Routing, Tensor | None]]) -> dict[str, LayerCounts]:
    """Count one forward pass, layers of one shape at once."""
    alike: dict[Any, list[str]] = {}
    for name, (routing, _) in found.items():
        alike.setdefault((routing.weights.shape, routing.weights.device), []).append(name)
    counted = {}
    for names in alike.values():
        weights_LTE = torch.stack([found[name][0].weights for name in names]).float()
        probs_LTE = torch.stack([found[name][0].probs for name in names]).float()
        tokens, device = weights_LTE.shape[1], weights_LTE.device
        masks = [found[name][1] for name in names]
        # A mask of other tokens (those of padding_id, for a layer that sees others) says nothing.
        fits = [mask is not None and len(mask) == tokens for mask in masks]
        every_T = torch.ones(tokens, dtype=torch.bool, device=device)
        real_LT = torch.stack(
            [
                mask.to(device) if mask is not None and fit else every_T
                for mask, fit in zip(masks, fits, strict=True)
            ]
        )
        finite_LT = weights_LTE.isfinite().all(-1)
        counted_LT1 = (finite_LT & real_LT)[..., None]
        weights_LTE = torch.where(counted_LT1, weights_LTE, 0)
        probs_LTE = torch.where(counted_LT1, probs_LTE, 0)
        sums = (
            counted_LT1.sum(1),
            (~finite_LT & real_LT).sum(1, keepdim=True),
            torch.special.entr(probs_LTE).sum((1, 2), keepdim=True)[:, 0],
            (weights_LTE > 0).sum(1),
            weights_LTE.sum(1),
        )
        # The accelerator is waited for once. Wider on the CPU: not all of them have float64.
        for name, row in zip(names, torch.cat(sums, 1).cpu().double(), strict=True):
            selected_E, weight_E = row[3:].chunk(2)
            counted[name] = LayerCounts(
                int(row[0]), selected_E, weight_E, float(row[2]), int(row[1])
            )
    return counted


def _before_padding(args: Any, kwargs: Mapping[str, Any], padding_id: int) -> Tensor | None:
    """True up to the last token of each sequence that is not `padding_id` (T,)."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return None
    return ((ids != padding_id).flip(1).cumsum(1).flip(1) > 0).flatten()
