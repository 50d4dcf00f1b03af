"""Auxiliary losses on the routers. One file each, one line in `LOSSES`."""

from __future__ import annotations

from .base import AuxLoss
from .switch_lb import switch_lb
from .z import z

LOSSES: dict[str, AuxLoss] = {
    "switch_lb": switch_lb,
    "z": z,
}

__all__ = ["LOSSES", "AuxLoss", "switch_lb", "z"]
