"""Multiplicative noise on what the router reads.

Shape suffixes: N rows, I in.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...types import LayerPlan, Rows
from .base import Modifier, number_in


class Jitter(Modifier):
    """Multiply each feature by its own U(1 - eps, 1 + eps) while training (Switch Transformers).

    The router alone sees it (arXiv 2101.03961, appendix; MixLoRA's switch form has eps = 0.01). A
    router that reads no features is left as it is.

    Args:
        value: eps, in [0, 1).
        plan: the layer's experts.
    """

    random = True
    example = 0.1

    def __init__(self, value: Any, plan: LayerPlan) -> None:
        super().__init__(value, plan)
        self.eps = number_in("jitter", value, "a number in [0, 1)", lambda number: 0 <= number < 1)

    def on_input(self, rows: Rows, state: nn.Module) -> Rows:
        """Features times noise."""
        if rows.x is None or not state.training:
            return rows
        noise_NI = torch.empty_like(rows.x).uniform_(1 - self.eps, 1 + self.eps)
        return replace(rows, x=rows.x * noise_NI)
