"""Every rank an expert.

Shape suffixes: I in, O out, E experts, which is also the total rank.
"""

from __future__ import annotations

from ..errors import ConfigError
from ..types import ExpertPair, LayerPlan
from .base import Tensors
from .lora import LoraExperts

_METRICS = ("expert", "joint")


class RankExperts(LoraExperts):
    """E_i(x) = s b_i a_i^T x: `num_experts` experts of rank 1 (SMoRA: B diag(G(x)) A x).

    Rank 1 is what `r=1` says, or `r=num_experts` with `total_rank`, which makes the scale alpha / r
    with r all ranks together, as for one LoRA.

    Args:
        plan: the layer's experts, all of rank 1.
        in_features: I.
        out_features: O.
        metric: the Riemannian metric. "expert": a number for each expert, |b_i|^2 for a_i and
            |a_i|^2 for b_i, since experts are selected apart; "joint": the E x E metrics B^T B and
            A A^T of the LoRA that all ranks together are.

    Raises:
        ConfigError: an expert's rank is not 1, or an unknown metric.
    """

    def __init__(
        self, plan: LayerPlan, in_features: int, out_features: int, *, metric: str = "expert"
    ) -> None:
        super().__init__(plan, in_features, out_features)
        if set(plan.ranks) != {1}:
            raise ConfigError(
                f"This expert kind has experts of rank 1, not {max(plan.ranks)}; set r to 1, or r "
                "to num_experts with total_rank."
            )
        if metric not in _METRICS:
            raise ConfigError(
                f"expert_kwargs['metric']={metric!r} must be one of {', '.join(_METRICS)}."
            )
        self.metric = metric

    def pairs(self, tensors: Tensors, scaling: float) -> list[ExpertPair]:
        """One pair, with metrics as `metric` says."""
        ranks = self.plan.ranks if self.metric == "expert" else (self.plan.total_rank,)
        return [ExpertPair(tensors["A"], tensors["B"], ranks, scaling)]
