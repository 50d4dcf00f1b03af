"""The LoRA scale s of a module's experts."""

from __future__ import annotations

import math
from collections.abc import Callable

from .config import MoeLoraConfig
from .lookup import lookup
from .types import LayerPlan


def _alpha_over_rank(config: MoeLoraConfig, plan: LayerPlan, in_features: int) -> float:
    """Alpha / r, or alpha / sqrt(r) with `use_rslora`; r is one expert's rank (their mean)."""
    return plan.scaling(config.use_rslora)


def _constant(config: MoeLoraConfig, plan: LayerPlan, in_features: int) -> float:
    """Alpha itself."""
    return plan.alpha


def _goat(config: MoeLoraConfig, plan: LayerPlan, in_features: int) -> float:
    """sqrt(3 eta d / r) with eta = alpha, r one expert's rank (GOAT, arXiv 2502.16894)."""
    return math.sqrt(3 * plan.alpha * in_features / (plan.total_rank / plan.num_experts))


SCALES: dict[str, Callable[[MoeLoraConfig, LayerPlan, int], float]] = {
    "alpha": _alpha_over_rank,
    "constant": _constant,
    "goat": _goat,
}


def scale_of(config: MoeLoraConfig, plan: LayerPlan, in_features: int) -> float:
    """The scale that `config.scale` names."""
    return lookup("scales", config.scale, SCALES)(config, plan, in_features)
