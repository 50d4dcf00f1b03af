"""Experts left out at random.

Shape suffixes: N rows, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...types import LayerPlan, Rows
from .base import Modifier, number_in


class ExpertDropout(Modifier):
    """Dropout on the probabilities before the selection, while training (SiRA, arXiv 2311.09179).

    Each expert of each row is left out with probability p and is then not selected; what stays is
    divided by 1 - p, which a router that renormalises does not see. Where a row would lose all its
    experts, the likeliest stays: the paper does not say what happens there.

    Args:
        value: p, in [0, 1).
        plan: the layer's experts.
    """

    random = True
    example = 0.3

    def __init__(self, value: Any, plan: LayerPlan) -> None:
        super().__init__(value, plan)
        self.p = number_in(
            "expert_dropout", value, "a number in [0, 1)", lambda number: 0 <= number < 1
        )

    def on_probs(self, probs_NE: Tensor, rows: Rows, state: nn.Module) -> Tensor:
        """Probabilities, some of them zero."""
        if not state.training:
            return probs_NE
        kept_NE = torch.rand_like(probs_NE) >= self.p
        none_N1 = ~kept_NE.any(-1, keepdim=True)
        best_NE = torch.zeros_like(kept_NE).scatter(-1, probs_NE.argmax(-1, keepdim=True), True)
        kept_NE = kept_NE | (none_N1 & best_NE)
        return probs_NE * kept_NE.to(probs_NE.dtype) / (1 - self.p)
