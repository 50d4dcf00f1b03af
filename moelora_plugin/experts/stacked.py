"""What expert kinds have in common whose factors are stacked along the rank.

Shape suffixes: T tokens, I in, O out, E experts, R total rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.rank_gated import mix, project
from ..types import ExpertInput, Gates, Projection, Shared
from .base import ExpertKind, Tensors


class StackedExperts(ExpertKind):
    """Experts that `ops.rank_gated` mixes in two products, whatever their number.

    Attributes:
        shared: which factor they share.
    """

    shared: Shared = "none"
    sums_outputs = True

    def project(
        self,
        tensors: Tensors,
        x_TI: Tensor,
        gate_EI: Tensor | None = None,
        dropout: float = 0.0,
        training: bool = False,
    ) -> Projection | None:
        """`ops.rank_gated.project`."""
        return project(x_TI, self._projecting(tensors, training), gate_EI, dropout)

    def _projecting(self, tensors: Tensors, training: bool) -> Tensor:
        """The A that x is multiplied with."""
        return tensors["A"]

    def update(self, tensors: Tensors, inputs: ExpertInput, gates: Gates) -> Tensor:
        """`ops.rank_gated`."""
        return self._mix(tensors, inputs, gates)

    def add_update(
        self, onto_TO: Tensor, tensors: Tensors, inputs: ExpertInput, gates: Gates
    ) -> Tensor:
        """The same, added in the place of the last product."""
        return self._mix(tensors, inputs, gates, onto_TO)

    def _mix(
        self,
        tensors: Tensors,
        inputs: ExpertInput,
        gates: Gates,
        onto_TO: Tensor | None = None,
    ) -> Tensor:
        projection = inputs.projection
        if projection is None:
            projection = self.project(tensors, inputs.x, training=inputs.training)
            assert projection is not None
        owners_R = self._owners(inputs.x)
        return mix(projection, tensors["B"], gates, owners_R, self.shared, onto_TO)

    def _owners(self, x_TI: Tensor) -> Tensor | None:
        """What `mix` needs to know where the ranks differ."""
        return None if self.plan.is_uniform else self._expert_of_rank(x_TI.device)

    def _expert_of_rank(self, device: torch.device) -> Tensor:
        """The expert that owns each rank (R,)."""
        ranks = enumerate(self.plan.ranks)
        return torch.tensor([e for e, rank in ranks for _ in range(rank)], device=device)
