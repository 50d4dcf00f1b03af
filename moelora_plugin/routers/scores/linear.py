"""A linear gate.

Shape suffixes: N rows, I in, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...types import LayerPlan, Rows
from .base import Score, reset_linear


class LinearScore(Score):
    """W x, or W x + b.

    Args:
        in_features: I.
        plan: the layer's experts.
        bias: add a bias, zero at first.
        std: draw W from a normal distribution of this standard deviation; `torch.nn.Linear`'s own
            initialisation where left out, as the reference code has it.
    """

    def __init__(
        self,
        in_features: int,
        plan: LayerPlan,
        *,
        bias: bool = False,
        std: float | None = None,
    ) -> None:
        super().__init__(in_features, plan)
        self.std = std
        self.weight = nn.Parameter(torch.empty(plan.num_experts, in_features))
        self.bias = nn.Parameter(torch.empty(plan.num_experts)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See `std`."""
        if self.std is None:
            reset_linear(self.weight)
        else:
            nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def matrix(self) -> Tensor:
        """W."""
        return self.weight

    def forward(self, rows: Rows, a: Tensor | None) -> Tensor:
        """Logits (N, E)."""
        if rows.product is not None:
            return rows.product if self.bias is None else rows.product + self.bias
        return torch.nn.functional.linear(self.features(rows), self.weight, self.bias)
