"""What every score is.

Shape suffixes: N rows, I in, E experts, R total rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from ...types import LayerPlan, Rows


class Score(nn.Module, ABC):
    """Rows -> logits (N, E), for one target module.

    Options are keyword-only parameters of the constructor and stand under `router_score_kwargs`.
    Parameters are direct attributes (no submodules), as a router's.

    Attributes:
        reads_input: whether the logits depend on `rows.x`.

    Args:
        in_features: I.
        plan: the layer's experts.
    """

    reads_input = True

    def __init__(self, in_features: int, plan: LayerPlan) -> None:
        super().__init__()
        self.in_features = in_features
        self.plan = plan

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the parameters afresh."""

    @abstractmethod
    def forward(self, rows: Rows, a: Tensor | None) -> Tensor:
        """Logits (N, E) of the rows.

        Args:
            rows: what is decided about.
            a: the experts' stacked A (R, I), for scores that read their activations A x.
        """
