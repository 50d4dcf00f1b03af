"""Allocations: how many experts, of which rank, each target module gets.

One file each, one line in `ALLOCATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .layers import layers
from .modules import modules
from .pattern import pattern
from .uniform import uniform

if TYPE_CHECKING:
    from ..types import LayerPlan

# (config, place) -> the module's experts. Options are keyword-only parameters and stand under
# `allocation_kwargs`.
Allocation = Callable[..., "LayerPlan"]

ALLOCATIONS: dict[str, Allocation] = {
    "uniform": uniform,
    "layers": layers,
    "pattern": pattern,
    "modules": modules,
}

__all__ = ["ALLOCATIONS", "Allocation", "layers", "modules", "pattern", "uniform"]
