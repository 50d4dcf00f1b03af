"""Route rows through a router as a layer does, without a model."""

from __future__ import annotations

import torch
from torch import Tensor

from moelora_plugin.routers import ROUTERS, Router
from moelora_plugin.routers.modifiers import MODIFIERS, RouterModifiers
from moelora_plugin.routers.scores import Score
from moelora_plugin.types import LayerPlan, Routing, Rows


def plan_of(num_experts: int, top_k: int = 2) -> LayerPlan:
    """Experts of rank 1."""
    return LayerPlan(num_experts, min(top_k, num_experts), (1,) * num_experts, alpha=1.0)


def make_router(name: str, num_experts: int, top_k: int = 2, width: int | None = None, **options):
    """A router in float64, of rows as wide as there are experts unless said otherwise."""
    plan = plan_of(num_experts, top_k)
    return ROUTERS[name](width or num_experts, plan, **options).double()


def make_modifiers(num_experts: int, top_k: int = 2, **values) -> RouterModifiers:
    """By name and value, as `router_modifiers` has them."""
    plan = plan_of(num_experts, top_k)
    return RouterModifiers([MODIFIERS[name](value, plan) for name, value in values.items()])


class Given(Score):
    """Logits x W^T with a given W, drawing nothing at random."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[1], plan_of(len(weight)))
        self.weight = weight  # no parameter of its own, so that a test reads its gradient

    def reset_parameters(self) -> None:
        raise NotImplementedError

    def forward(self, rows: Rows, a: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(rows.x, self.weight)


def route_rows(
    router: Router,
    x: Tensor,
    weight: Tensor | None = None,
    modifiers: RouterModifiers | None = None,
    real: Tensor | None = None,
    batch: int = 1,
) -> Routing:
    """Logits x W^T; without a weight the rows are the logits."""
    weight = torch.eye(x.shape[1], dtype=x.dtype) if weight is None else weight
    rows = Rows(x, real=real, batch=batch)
    return router(rows, Given(weight), modifiers or RouterModifiers([]))
