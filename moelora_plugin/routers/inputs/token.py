"""Every token is decided about by itself.

Shape suffixes: I in, T tokens.
"""

from __future__ import annotations

from torch import Tensor

from ...call import Call
from ...types import Rows
from .base import RouterInput


class TokenInput(RouterInput):
    """Rows are tokens."""

    by_token = True

    def rows(self, x: Tensor, call: Call) -> Rows:
        """One row per token."""
        x_TI = x.reshape(-1, x.shape[-1])
        real = call.real_among(x.shape[:-1])
        return Rows(x=x_TI, real=real, batch=x.shape[0] if x.ndim == 3 else 1)
