"""Keep the top k of a softmax.

Shape suffixes: N rows, E experts, K selected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import LayerPlan, Rows
from .base import Router, softmax_wide


class TopKRouter(Router):
    """The paper's router (arXiv 2502.15828, section 4.1): top-k of softmax(logits), renormalised.

    The softmax runs in fp32 or wider. Exactly k experts are selected per row, ties included (which
    of the tied experts is `torch.topk`'s choice). A row whose logits hold NaN gets NaN gates, so
    the fault shows in the loss; it does not touch other rows.

    Differs from the reference code, which takes the softmax in the base output's dtype.

    Args:
        in_features: I.
        plan: the layer's experts; `top_k` of them are selected.
        renormalize: divide the kept gates by their sum. With it the gates are those of a softmax
            over the selected logits alone.
    """

    def __init__(self, in_features: int, plan: LayerPlan, *, renormalize: bool = True) -> None:
        super().__init__(in_features, plan)
        self.renormalize = renormalize

    def probabilities(self, logits_NE: Tensor, rows: Rows) -> Tensor:
        """Softmax over all experts."""
        return softmax_wide(logits_NE)

    def select(
        self, probs_NE: Tensor, preference_NE: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor | None]:
        """With k of a row non-zero, summing to 1 if renormalised."""
        ids_NK = torch.topk(preference_NE, self.plan.top_k, dim=-1).indices
        kept_NK = probs_NE.gather(-1, ids_NK)
        if self.renormalize:
            kept_NK = kept_NK / kept_NK.sum(-1, keepdim=True)
        return torch.zeros_like(probs_NE).scatter(-1, ids_NK, kept_NK), ids_NK

    def fixed_weights(self) -> Tensor | None:
        """One expert always has gate 1."""
        return torch.ones(1) if self.plan.num_experts == 1 else None
