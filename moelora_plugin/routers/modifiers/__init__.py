"""Modifiers: what may be changed on the way from a router's input to its gates.

One file each, one line in `MODIFIERS`.
"""

from __future__ import annotations

from .balance_bias import BalanceBias
from .base import Modifier, RouterModifiers
from .capacity import Capacity
from .expert_dropout import ExpertDropout
from .jitter import Jitter
from .noise import Noise
from .temperature import Temperature

MODIFIERS: dict[str, type[Modifier]] = {
    "temperature": Temperature,
    "jitter": Jitter,
    "noise": Noise,
    "expert_dropout": ExpertDropout,
    "capacity": Capacity,
    "balance_bias": BalanceBias,
}

__all__ = [
    "MODIFIERS",
    "BalanceBias",
    "Capacity",
    "ExpertDropout",
    "Jitter",
    "Modifier",
    "Noise",
    "RouterModifiers",
    "Temperature",
]
