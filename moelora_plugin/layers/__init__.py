"""The tuner layers."""

from __future__ import annotations

from .aux_loss import AuxLosses
from .linear import MoeLoraLinear

__all__ = ["AuxLosses", "MoeLoraLinear"]
