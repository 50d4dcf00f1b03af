"""The same experts everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..types import LayerPlan

if TYPE_CHECKING:
    from ..config import MoeLoraConfig


def uniform(config: MoeLoraConfig, module_name: str) -> LayerPlan:
    """`num_experts` experts of rank `r` in every target module, whatever its name."""
    return LayerPlan(
        num_experts=config.num_experts,
        top_k=config.top_k,
        ranks=(config.r,) * config.num_experts,
        alpha=config.lora_alpha,
    )
