"""The small values that layers, routers, allocations and optimizers pass to each other.

Shape suffixes: T tokens, E experts, K selected experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

GateRescale = Literal["none", "sqrt", "exact"]
GateRescaleScope = Literal["weights", "output"]
OptimizerName = Literal["rsgd", "grsgd", "radamw", "gradamw"]


@dataclass(frozen=True)
class LayerPlan:
    """What one target module gets: the allocation's answer for it.

    Attributes:
        num_experts: E.
        top_k: experts selected for a token.
        ranks: rank of each expert; R is their sum.
        alpha: LoRA alpha; the update is scaled by alpha / r (or alpha / sqrt(r) with rsLoRA), r
            being the mean rank of the experts.
    """

    num_experts: int
    top_k: int
    ranks: tuple[int, ...]
    alpha: float

    @property
    def total_rank(self) -> int:
        """R, the number of rows of the stacked A."""
        return sum(self.ranks)

    @property
    def is_uniform(self) -> bool:
        """Whether every expert has the same rank."""
        return len(set(self.ranks)) == 1

    def scaling(self, use_rslora: bool = False) -> float:
        """The LoRA scale s."""
        rank = self.total_rank / self.num_experts
        return self.alpha / (math.sqrt(rank) if use_rslora else rank)


@dataclass(frozen=True)
class Routing:
    """A router's decision for T tokens.

    Attributes:
        logits: raw scores (T, E).
        probs: distribution over all experts (T, E), fp32 or wider.
        weights: gates after selection (T, E), zeros for experts that were not selected.
        expert_ids: the selected experts (T, K) where the router selects, else None.
    """

    logits: torch.Tensor
    probs: torch.Tensor
    weights: torch.Tensor
    expert_ids: torch.Tensor | None = None


@dataclass(frozen=True)
class ExpertPair:
    """The factors of one layer's experts, as the Riemannian optimizers take them.

    Attributes:
        a: stacked A (R, in).
        b: stacked B (out, R).
        ranks: rank of each expert.
        scaling: LoRA scale s.
    """

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    ranks: tuple[int, ...]
    scaling: float
