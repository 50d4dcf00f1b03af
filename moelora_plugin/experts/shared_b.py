"""One B for all experts, an A_i for each.

Shape suffixes: T tokens, I in, O out, E experts, R total rank (E r); r is one expert's rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import ExpertPair, LayerPlan, Shared
from .base import Tensors
from .stacked import StackedExperts


class SharedBExperts(StackedExperts):
    """E_i(x) = s B A_i x: the mirror image of HydraLoRA's shared A.

    Riemannian metrics: B's is sum_i A_i A_i^T, every A_i has B^T B.

    Args:
        plan: the layer's experts, all of one rank.
        in_features: I.
        out_features: O.

    Raises:
        ConfigError: the ranks differ.
    """

    shared: Shared = "b"

    def __init__(self, plan: LayerPlan, in_features: int, out_features: int) -> None:
        super().__init__(plan, in_features, out_features)
        self.rank = self.uniform_rank()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A is (R, I), B is (O, r)."""
        return {"A": (self.plan.total_rank, self.in_features), "B": (self.out_features, self.rank)}

    def split(self, tensors: Tensors) -> list[tuple[Tensor, Tensor]]:
        """Views (A_i (r, I), B (O, r)): B is in every pair."""
        return [(a, tensors["B"]) for a in tensors["A"].split(self.rank)]

    def static_update(self, tensors: Tensors, weights_E: Tensor, scaling: float) -> Tensor:
        """S B (sum_i g_i A_i)."""
        a_ErI = tensors["A"].unflatten(0, (-1, self.rank))
        return tensors["B"] @ torch.einsum("eri,e->ri", a_ErI, weights_E.to(a_ErI.dtype)) * scaling

    def pairs(self, tensors: Tensors, scaling: float) -> list[ExpertPair]:
        """One pair that shares B."""
        return [ExpertPair(tensors["A"], tensors["B"], self.plan.ranks, scaling, "b")]
