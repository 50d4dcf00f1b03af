"""The tuner layers."""

from __future__ import annotations

from .aux_loss import AuxLosses
from .folding import refuse_tied
from .gate_source import GateSource
from .linear import MoeLoraLinear
from .routed import RoutedLayer, Shared

__all__ = ["AuxLosses", "GateSource", "MoeLoraLinear", "RoutedLayer", "Shared", "refuse_tied"]
