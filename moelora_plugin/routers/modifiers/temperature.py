"""Sharper or softer gates.

Shape suffixes: N rows, E experts.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ...types import LayerPlan, Rows
from .base import Modifier, number_in


class Temperature(Modifier):
    """Divide the logits by a temperature: below 1 sharper, above 1 softer.

    Args:
        value: the temperature, positive.
        plan: the layer's experts.
    """

    example = 0.5

    def __init__(self, value: Any, plan: LayerPlan) -> None:
        super().__init__(value, plan)
        self.temperature = number_in(
            "temperature", value, "positive", lambda number: 0 < number < math.inf
        )

    def on_logits(self, logits_NE: Tensor, rows: Rows, state: nn.Module) -> Tensor:
        """Logits over temperature."""
        return logits_NE / self.temperature
