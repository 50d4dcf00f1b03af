"""Allocations: how many experts, of which rank, each target module gets.

One file each, one line in `ALLOCATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .layers import check_layers, layers
from .modules import check_modules, modules
from .pattern import check_pattern, pattern
from .uniform import check_uniform, uniform

if TYPE_CHECKING:
    from ..config import MoeLoraConfig
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

# What of an allocation's options can be checked without a base, and the plans that are then known.
CHECKS: dict[Allocation, Callable[[MoeLoraConfig], list[LayerPlan]]] = {
    uniform: check_uniform,
    layers: check_layers,
    pattern: check_pattern,
    modules: check_modules,
}

__all__ = ["ALLOCATIONS", "CHECKS", "Allocation", "layers", "modules", "pattern", "uniform"]
