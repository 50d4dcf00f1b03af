"""Initial values of the experts. One file each, one line in `INITIALIZATIONS`."""

from __future__ import annotations

from .base import Initialization, InitInput
from .kaiming import Kaiming

INITIALIZATIONS: dict[str, type[Initialization]] = {
    "kaiming": Kaiming,
}

__all__ = ["INITIALIZATIONS", "InitInput", "Initialization", "Kaiming"]
