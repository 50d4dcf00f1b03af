"""All experts, each with its softmax share.

Shape suffixes: N rows, E experts.
"""

from __future__ import annotations

from torch import Tensor

from ..types import Rows
from .base import Router, softmax_wide


class SoftmaxRouter(Router):
    """Dense gates softmax(logits)     (LoRAMoE, HydraLoRA, MOELoRA, MoLORA and MoV).

    `top_k` of the plan is not read.
    """

    def probabilities(self, scores_NE: Tensor, rows: Rows) -> Tensor:
        """Softmax over all experts."""
        return softmax_wide(scores_NE)

    def select(
        self, probs_NE: Tensor, preference_NE: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor | None]:
        """The probabilities."""
        return probs_NE, None

    def fixed_weights(self) -> Tensor | None:
        """One expert always has gate 1."""
        return self.one_expert()
