"""PEFT's LoRA initialisation for every expert.

Shape suffixes: I in, O out, R total rank.
"""

from __future__ import annotations

import math

from torch import Tensor, nn


def kaiming(a_RI: Tensor, b_OR: Tensor) -> None:
    """A uniform in (-1/sqrt(I), 1/sqrt(I)), B zero, in place.

    The bound depends on I alone, so drawing the stacked A at once gives each expert LoRA's own
    distribution.
    """
    nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5))
    nn.init.zeros_(b_OR)
