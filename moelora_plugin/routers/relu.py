"""The experts with a positive logit.

Shape suffixes: N rows, E experts.
"""

from __future__ import annotations

from torch import Tensor

from ..types import Rows
from .base import Router
from .scores.base import widened


class ReluRouter(Router):
    """ReMoE (arXiv 2412.14711): gates relu(logits), differentiable wherever an expert is on.

    A row may open every expert or none. `top_k` of the plan is not read. ReMoE steers how many are
    on by an L1 loss on the gates, whose coefficient it adapts; that is a loss and not part of this.
    """

    def probabilities(self, scores_NE: Tensor, rows: Rows) -> Tensor:
        """The positive part of the scores; they do not sum to 1."""
        return widened(scores_NE).relu()

    def select(
        self, probs_NE: Tensor, preference_NE: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor | None]:
        """The same."""
        return probs_NE, None
