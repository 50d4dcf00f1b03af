"""From numbers to a LayerPlan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..types import LayerPlan

if TYPE_CHECKING:
    from ..config import MoeLoraConfig


def plan_of(
    config: MoeLoraConfig,
    num_experts: int,
    top_k: int,
    r: int | Sequence[int],
    alpha: float,
) -> LayerPlan:
    """The plan of one module.

    Args:
        config: says with `total_rank` whether a single `r` is one expert's or is split over them.
        num_experts: experts.
        top_k: experts selected for a token.
        r: rank of each expert, one for all or one per expert.
        alpha: LoRA alpha.

    Raises:
        ConfigError: the rank cannot be split evenly, or top_k is more than num_experts.
    """
    if top_k > num_experts:
        raise ConfigError(
            f"top_k={top_k} is more than num_experts={num_experts}; lower top_k or raise "
            "num_experts."
        )
    if not isinstance(r, int):
        if len(r) != num_experts:
            raise ConfigError(
                f"r={list(r)!r} must hold one rank for each of {num_experts} experts."
            )
        return LayerPlan(num_experts, top_k, tuple(r), alpha)
    if not config.total_rank:
        return LayerPlan(num_experts, top_k, (r,) * num_experts, alpha)
    if r % num_experts:
        raise ConfigError(
            f"r={r} cannot be split evenly over num_experts={num_experts}; make r a multiple of it "
            "or set total_rank to False."
        )
    return LayerPlan(num_experts, top_k, (r // num_experts,) * num_experts, alpha, scale_rank=r)
