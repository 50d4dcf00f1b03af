"""What every router input is.

Shape suffixes: I in, B sequences, S positions, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ...call import Call
from ...errors import ConfigError
from ...types import Rows


class RouterInput(ABC):
    """A layer's input -> the rows that its router decides about.

    Options are keyword-only parameters of the constructor and stand under `router_input_kwargs`.
    One object belongs to one layer and adapter. It holds no state of its own: what a later call of
    a generation needs is kept with the call (`Call.kept`), under this object as the key.

    Attributes:
        by_token: whether the rows are the layer's tokens as they come.
        decides_over_sequence: whether a decision needs to see its sequence as a whole.
    """

    by_token = False
    decides_over_sequence = False

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


def by_sequence(x: Tensor, call: Call, key: str) -> Tensor:
    """A layer's input as (B, S, I).

    A layer whose input is flat, (T, I), is taken apart by the shape of the model's call.

    Args:
        x: (B, S, I) or (T, I).
        call: the model's call.
        key: the router input's name, for the error.

    Raises:
        ConfigError: there is no telling which tokens make a sequence.
    """
    if x.ndim == 3:
        return x
    if x.ndim == 2 and call.shape is not None and len(x) == call.shape[0] * call.shape[1]:
        return x.view(*call.shape, x.shape[-1])
    raise ConfigError(
        f"router_input={key!r} decides about sequences, and a layer got tokens of shape "
        f"{tuple(x.shape)} that are not those of the call's sequences; name the layer in "
        "exclude_modules, or set router_input='token'."
    )


def spread(rows: int, positions: int, device: torch.device) -> Tensor:
    """The row of each token (T,), `positions` tokens in a row sharing one."""
    return torch.arange(rows, device=device).repeat_interleave(positions)
