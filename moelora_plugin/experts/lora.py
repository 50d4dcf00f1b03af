"""Ordinary LoRA experts: each its own A_i (r_i, in) and B_i (out, r_i), stacked along the rank.

Shape suffixes: T tokens, I in, O out, E experts, R total rank; r is one expert's rank.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from ..ops.rank_gated import rank_gated
from ..types import GateRescale, GateRescaleScope, LayerPlan
from .base import ExpertKind


class LoraExperts(ExpertKind):
    """E_i(x) = s B_i A_i x (arXiv 2502.15828, eq. 8)."""

    def shapes(
        self, plan: LayerPlan, in_features: int, out_features: int
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """A is (R, I), B is (O, R)."""
        return (plan.total_rank, in_features), (out_features, plan.total_rank)

    def update(
        self,
        x_TI: Tensor,
        a: Tensor,
        b: Tensor,
        weights_TE: Tensor,
        plan: LayerPlan,
        scaling: float,
        gate_rescale: GateRescale,
        gate_rescale_scope: GateRescaleScope,
    ) -> Tensor:
        """`ops.rank_gated`: two products for all experts together."""
        owners = None if plan.is_uniform else _expert_of_rank(plan.ranks, x_TI.device)
        return rank_gated(x_TI, a, b, weights_TE, scaling, gate_rescale, gate_rescale_scope, owners)

    def split(self, a: Tensor, b: Tensor, plan: LayerPlan) -> list[tuple[Tensor, Tensor]]:
        """Views (A_i (r_i, I), B_i (O, r_i))."""
        stops = list(accumulate(plan.ranks))
        blocks = [slice(stop - rank, stop) for stop, rank in zip(stops, plan.ranks, strict=True)]
        return [(a[block], b[:, block]) for block in blocks]

    def static_update(
        self, a: Tensor, b: Tensor, weights_E: Tensor, plan: LayerPlan, scaling: float
    ) -> Tensor:
        """S * B diag(spread(g)) A."""
        owners = _expert_of_rank(plan.ranks, a.device)
        return (b * weights_E.to(b.dtype)[owners]) @ a * scaling


def _expert_of_rank(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """The expert that owns each rank (R,)."""
    return torch.tensor(
        [expert for expert, rank in enumerate(ranks) for _ in range(rank)], device=device
    )
