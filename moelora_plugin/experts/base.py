"""What every expert kind is: stateless functions of the parameters that the layer owns.

Shape suffixes: T tokens, I in, O out, E experts, R total rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from ..types import GateRescale, GateRescaleScope, LayerPlan


class ExpertKind(ABC):
    """How A and B are shaped, mixed, taken apart and folded into one weight."""

    @abstractmethod
    def shapes(
        self, plan: LayerPlan, in_features: int, out_features: int
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of A and B."""

    @abstractmethod
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
        """The mixture's update (T, O); x has dropout applied."""

    @abstractmethod
    def split(self, a: Tensor, b: Tensor, plan: LayerPlan) -> list[tuple[Tensor, Tensor]]:
        """Views (A_i, B_i), one pair per expert."""

    @abstractmethod
    def static_update(
        self, a: Tensor, b: Tensor, weights_E: Tensor, plan: LayerPlan, scaling: float
    ) -> Tensor:
        """The weight update (O, I) for gates that do not depend on the input."""
