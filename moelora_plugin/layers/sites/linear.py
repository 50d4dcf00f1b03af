"""A router per target module."""

from __future__ import annotations

from ...types import LayerPlan, Place
from .base import Site


class LinearSite(Site):
    """Every target module decides for itself (arXiv 2502.15828; MoLA, LoRAMoE, HydraLoRA, ...)."""

    def expert_plan(self, place: Place, plan: LayerPlan) -> LayerPlan:
        """What the allocation says."""
        return plan

    def router_plan(self, place: Place, plan: LayerPlan) -> LayerPlan | None:
        """The same."""
        return plan
