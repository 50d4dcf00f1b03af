"""The same experts everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..types import LayerPlan, Place
from .base import plan_of

if TYPE_CHECKING:
    from ..config import MoeLoraConfig


def uniform(config: MoeLoraConfig, place: Place | None) -> LayerPlan:
    """`num_experts` experts of rank `r` in every target module, wherever it is."""
    return plan_of(config, config.num_experts, config.top_k, config.r, config.lora_alpha)


def check_uniform(config: MoeLoraConfig) -> list[LayerPlan]:
    """Without a base: the plan, whose numbers have to fit together.

    Raises:
        ConfigError: they do not.
    """
    return [uniform(config, None)]
