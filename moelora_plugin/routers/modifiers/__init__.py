"""Modifiers: what may be changed on the way from a router's input to its gates.

One file each, one line in `MODIFIERS`.
"""

from __future__ import annotations

from .base import Modifier, RouterModifiers
from .temperature import Temperature

MODIFIERS: dict[str, type[Modifier]] = {
    "temperature": Temperature,
}

__all__ = ["MODIFIERS", "Modifier", "RouterModifiers", "Temperature"]
