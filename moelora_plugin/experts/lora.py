"""Ordinary LoRA experts: each its own A_i (r_i, in) and B_i (out, r_i), stacked along the rank.

Shape suffixes: T tokens, I in, O out, E experts, R total rank; r is one expert's rank.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from ..ops.rank_gated import rank_gated
from ..types import ExpertInput, ExpertPair, Gates
from .base import ExpertKind, Tensors


class LoraExperts(ExpertKind):
    """E_i(x) = s B_i A_i x (arXiv 2502.15828, eq. 8)."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A is (R, I), B is (O, R)."""
        rank = self.plan.total_rank
        return {"A": (rank, self.in_features), "B": (self.out_features, rank)}

    def update(self, tensors: Tensors, inputs: ExpertInput, gates: Gates) -> Tensor:
        """`ops.rank_gated`: two products for all experts together."""
        owners = None if self.plan.is_uniform else self._expert_of_rank(inputs.x.device)
        return rank_gated(inputs.x, tensors["A"], tensors["B"], gates, owners)

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

    def _expert_of_rank(self, device: torch.device) -> Tensor:
        """The expert that owns each rank (R,)."""
        ranks = enumerate(self.plan.ranks)
        return torch.tensor([e for e, rank in ranks for _ in range(rank)], device=device)
