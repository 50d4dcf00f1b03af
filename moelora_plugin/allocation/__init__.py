"""Allocations: how many experts, of which rank, each target module gets.

One file each, one line in `ALLOCATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .uniform import uniform

if TYPE_CHECKING:
    from ..config import MoeLoraConfig
    from ..types import LayerPlan

ALLOCATIONS: dict[str, Callable[[MoeLoraConfig, str], LayerPlan]] = {
    "uniform": uniform,
}

__all__ = ["ALLOCATIONS", "uniform"]
