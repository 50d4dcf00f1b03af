"""Gates that ask nobody.

Shape suffixes: N rows, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...types import LayerPlan, Rows
from .base import Score


class StaticScore(Score):
    """The same logits (E,) for every row.

    LoRA Soups' CAT (arXiv 2410.13025) learns one weight per expert and layer; MELoRA
    (arXiv 2402.17263) adds its experts up, which is `trainable=False` with a router that passes
    the value 1 on. Whatever the router makes of them, such an adapter merges exactly with
    `router_input="none"`.

    Args:
        in_features: I, not read.
        plan: the layer's experts.
        value: of every logit at first.
        trainable: learn them; else they stay as they are.
    """

    reads_input = False

    def __init__(
        self,
        in_features: int,
        plan: LayerPlan,
        *,
        value: float = 0.0,
        trainable: bool = True,
    ) -> None:
        super().__init__(in_features, plan)
        self.value = float(value)
        logits = torch.empty(plan.num_experts)
        if trainable:
            self.logits = nn.Parameter(logits)
        else:
            self.register_frozen("logits", logits)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All the same."""
        nn.init.constant_(self.logits, self.value)

    def forward(self, rows: Rows, a: Tensor | None) -> Tensor:
        """Logits (N, E)."""
        given = rows.x if rows.x is not None else rows.ids
        return self.logits.expand(1 if given is None else len(given), -1)
