"""PEFT's LoRA initialisation for every expert.

Shape suffixes: I in, O out, R total rank.
"""

from __future__ import annotations

import math

from torch import nn

from .base import Initialization, InitInput


class Kaiming(Initialization):
    """A uniform in (-1/sqrt(I), 1/sqrt(I)), B zero.

    The bound depends on I alone, so drawing the stacked A at once gives each expert LoRA's own
    distribution.
    """

    def __call__(self, inputs: InitInput) -> None:
        """Fill A and B in place, where there are such."""
        if "A" in inputs.tensors:
            nn.init.kaiming_uniform_(inputs.tensors["A"], a=math.sqrt(5))
        if "B" in inputs.tensors:
            nn.init.zeros_(inputs.tensors["B"])
