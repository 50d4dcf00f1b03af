"""Auxiliary losses on routers and experts. One file each, one line in `LOSSES`."""

from __future__ import annotations

from .base import AuxLoss, LossInput
from .switch_lb import switch_lb
from .z import z

LOSSES: dict[str, AuxLoss] = {
    "switch_lb": switch_lb,
    "z": z,
}

__all__ = ["LOSSES", "AuxLoss", "LossInput", "switch_lb", "z"]
