"""Initial values of the experts. One file each, one line in `INITIALIZATIONS`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .kaiming import kaiming

INITIALIZATIONS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "kaiming": kaiming,
}

__all__ = ["INITIALIZATIONS", "kaiming"]
