"""The tuner layers."""

from __future__ import annotations

from .linear import MoeLoraLinear

__all__ = ["MoeLoraLinear"]
