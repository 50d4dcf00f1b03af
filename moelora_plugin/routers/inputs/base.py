"""What every router input is.

Shape suffixes: I in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from ...call import Call
from ...types import Rows


class RouterInput(ABC):
    """A layer's input -> the rows that its router decides about.

    Options are keyword-only parameters of the constructor and stand under `router_input_kwargs`.
    One object belongs to one layer and adapter, so it may keep what a later call needs.
    """

    @abstractmethod
    def rows(self, x: Tensor, call: Call) -> Rows:
        """The rows.

        Args:
            x: the layer's input (..., I); (B, S, I) in transformers.
            call: what the model's call says about padding, prompt and ids.

        Raises:
            ConfigError: the call lacks what this input needs; the message says how to give it.
        """

    def fixed_rows(self, call: Call) -> Rows | None:
        """The one row that all tokens share whatever they are, so that a merge is exact."""
        return None
