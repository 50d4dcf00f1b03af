"""One decision for everything.

Shape suffixes: T tokens, I in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...call import Call
from ...types import Rows
from .base import RouterInput


class NoInput(RouterInput):
    """One row that all tokens share: gates that do not depend on the input (LoRA Soups, MELoRA)."""

    def rows(self, x: Tensor, call: Call) -> Rows:
        """The row."""
        tokens = x.shape[:-1].numel()
        return Rows(x=None, row_of_token=torch.zeros(tokens, dtype=torch.long, device=x.device))

    def fixed_rows(self, call: Call) -> Rows | None:
        """The row."""
        return Rows(x=None)
