"""Sharper or softer gates.

Shape suffixes: N rows, E experts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...errors import ConfigError
from ...types import LayerPlan, Rows
from .base import Modifier


class Temperature(Modifier):
    """Divide the logits by a temperature: below 1 sharper, above 1 softer.

    Args:
        value: the temperature, positive.
        plan: the layer's experts.
    """

    def __init__(self, value: Any, plan: LayerPlan) -> None:
        super().__init__(value, plan)
        if not value > 0:
            raise ConfigError(f"router_modifiers['temperature']={value!r} must be positive.")
        self.temperature = float(value)

    def on_logits(self, logits_NE: Tensor, rows: Rows, state: nn.Module) -> Tensor:
        """Logits over temperature."""
        return logits_NE / self.temperature
