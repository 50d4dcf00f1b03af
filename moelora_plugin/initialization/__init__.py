"""Initial values of the experts. One file each, one line in `INITIALIZATIONS`."""

from __future__ import annotations

from .adapters import Adapters
from .base import Initialization, InitInput
from .gaussian import Gaussian
from .kaiming import Kaiming
from .svd import Milora, Pissa, Segments

INITIALIZATIONS: dict[str, type[Initialization]] = {
    "adapters": Adapters,
    "gaussian": Gaussian,
    "kaiming": Kaiming,
    "milora": Milora,
    "pissa": Pissa,
    "segments": Segments,
}

__all__ = [
    "INITIALIZATIONS",
    "Adapters",
    "Gaussian",
    "InitInput",
    "Initialization",
    "Kaiming",
    "Milora",
    "Pissa",
    "Segments",
]
