"""Ordinary LoRA experts: each its own A_i (r_i, in) and B_i (out, r_i), stacked along the rank.

Shape suffixes: T tokens, I in, O out, E experts, R total rank; r is one expert's rank.
"""

from __future__ import annotations

from itertools import accumulate

from torch import Tensor, nn

from ..ops.grouped import grouped_experts, prefers_grouped
from ..types import ExpertInput, ExpertPair, Gates, LayerPlan
from .base import Tensors
from .stacked import StackedExperts


class LoraExperts(StackedExperts):
    """E_i(x) = s B_i A_i x (arXiv 2502.15828, eq. 8).

    Args:
        plan: the layer's experts.
        in_features: I.
        out_features: O.
        frozen: keep A and B as they are loaded or initialised, and train the router only (experts
            that come from existing adapters). They are zero until an initialisation that reads
            adapters, or an adapter's file, fills them.
    """

    def __init__(
        self, plan: LayerPlan, in_features: int, out_features: int, *, frozen: bool = False
    ) -> None:
        super().__init__(plan, in_features, out_features)
        if frozen:
            self.frozen = frozenset({"A", "B"})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A is (R, I), B is (O, R)."""
        rank = self.plan.total_rank
        return {"A": (rank, self.in_features), "B": (self.out_features, rank)}

    def reset(self, tensors: Tensors) -> None:
        """Zeros where frozen: an initialisation is not given frozen tensors, only their views."""
        for name in self.frozen:
            nn.init.zeros_(tensors[name])

    def by_groups(self, tokens: int, selected: float, device_type: str) -> bool:
        """As `ops.grouped` measured it."""
        if not self.plan.is_uniform:
            return False
        width = (self.in_features + self.out_features) // 2
        experts, rank = self.plan.num_experts, self.plan.ranks[0]
        return prefers_grouped(tokens, experts, selected, rank, width, device_type)

    def _mix(
        self, tensors: Tensors, inputs: ExpertInput, gates: Gates, onto_TO: Tensor | None = None
    ) -> Tensor:
        if inputs.by_groups:
            return grouped_experts(inputs.x, tensors["A"], tensors["B"], gates, onto_TO)
        return super()._mix(tensors, inputs, gates, onto_TO)

    def split(self, tensors: Tensors) -> list[tuple[Tensor, Tensor]]:
        """Views (A_i (r_i, I), B_i (O, r_i))."""
        ranks = self.plan.ranks
        stops = list(accumulate(ranks))
        blocks = [slice(stop - rank, stop) for stop, rank in zip(stops, ranks, strict=True)]
        return [(tensors["A"][block], tensors["B"][:, block]) for block in blocks]

    def static_update(self, tensors: Tensors, weights_E: Tensor, scaling: float) -> Tensor:
        """S * B diag(spread(g)) A."""
        a, b = tensors["A"], tensors["B"]
        return (b * weights_E.to(b.dtype)[self._expert_of_rank(a.device)]) @ a * scaling

    def pairs(self, tensors: Tensors, scaling: float) -> list[ExpertPair]:
        """One pair, with one metric per expert."""
        return [ExpertPair(tensors["A"], tensors["B"], self.plan.ranks, scaling)]
