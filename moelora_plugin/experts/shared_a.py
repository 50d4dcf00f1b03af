"""One A for all experts, a B_i for each.

Shape suffixes: T tokens, I in, O out, E experts, R total rank (E r); r is one expert's rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..types import ExpertPair, LayerPlan, Shared
from .base import Tensors
from .stacked import StackedExperts


class SharedAExperts(StackedExperts):
    """E_i(x) = s B_i A x (HydraLoRA, arXiv 2404.19245).

    Riemannian metrics: A's is sum_i B_i^T B_i, which is B^T B of the update s sum_i B_i A seen as
    one map to all experts' outputs, and every B_i has A A^T.

    Args:
        plan: the layer's experts, all of one rank.
        in_features: I.
        out_features: O.
        a_dropout: probability that an entry of A is dropped in a training step (MoSLD, arXiv
            2412.08946, whose abstract and summary say "dropout on A"; entry by entry, one mask for
            all tokens, is our reading). `lora_dropout` drops x as always.

    Raises:
        ConfigError: the ranks differ, or a_dropout is outside [0, 1).
    """

    shared: Shared = "a"

    def __init__(
        self, plan: LayerPlan, in_features: int, out_features: int, *, a_dropout: float = 0.0
    ) -> None:
        super().__init__(plan, in_features, out_features)
        if not 0 <= a_dropout < 1:
            raise ConfigError(f"expert_kwargs['a_dropout']={a_dropout!r} must be in [0, 1).")
        self.rank = self.uniform_rank()
        self.a_dropout = a_dropout

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A is (r, I), B is (O, R)."""
        return {"A": (self.rank, self.in_features), "B": (self.out_features, self.plan.total_rank)}

    def _projecting(self, tensors: Tensors, training: bool) -> Tensor:
        """A, of which a training step drops entries where `a_dropout` says so."""
        a = tensors["A"]
        return torch.nn.functional.dropout(a, self.a_dropout, training) if self.a_dropout else a

    def split(self, tensors: Tensors) -> list[tuple[Tensor, Tensor]]:
        """Views (A (r, I), B_i (O, r)): A is in every pair."""
        return [(tensors["A"], b) for b in tensors["B"].split(self.rank, 1)]

    def static_update(self, tensors: Tensors, weights_E: Tensor, scaling: float) -> Tensor:
        """S (sum_i g_i B_i) A."""
        b_OEr = tensors["B"].unflatten(1, (-1, self.rank))
        return torch.einsum("oer,e->or", b_OEr, weights_E.to(b_OEr.dtype)) @ tensors["A"] * scaling

    def pairs(self, tensors: Tensors, scaling: float) -> list[ExpertPair]:
        """One pair that shares A."""
        return [ExpertPair(tensors["A"], tensors["B"], self.plan.ranks, scaling, "a")]
