"""Gaussian noise on the logits.

Shape suffixes: N rows, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...types import LayerPlan, Rows
from .base import Modifier, number_in


class Noise(Modifier):
    """Add N(0, std^2) to each logit while training (MoCLE, arXiv 2312.12379: std = 0.1).

    MoCLE adds it before the temperature: put "noise" first. The noise learned from the input is the
    router "noisy_topk".

    Args:
        value: std, not negative.
        plan: the layer's experts.
    """

    random = True
    example = 0.1

    def __init__(self, value: Any, plan: LayerPlan) -> None:
        super().__init__(value, plan)
        self.std = number_in(
            "noise", value, "a number of at least 0", lambda number: 0 <= number < math.inf
        )

    def on_logits(self, logits_NE: Tensor, rows: Rows, state: nn.Module) -> Tensor:
        """Logits plus noise."""
        if not state.training:
            return logits_NE
        return logits_NE + self.std * torch.randn_like(logits_NE)
