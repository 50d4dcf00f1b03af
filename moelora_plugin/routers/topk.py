"""Softmax over all experts, keep the top k, renormalise.

Shape suffixes: T tokens, I in, E experts, K selected.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..types import LayerPlan, Routing
from .base import Router


class TopKRouter(Router):
    """The paper's router (arXiv 2502.15828, section 4.1): g = top-k of softmax(W x), renormalised.

    The softmax runs in fp32 or wider whatever the dtype of x. Exactly k experts are selected per
    token, ties included (which of the tied experts is `torch.topk`'s choice). A token whose logits
    hold NaN gets NaN gates, so the fault shows in the loss; it does not touch other tokens.

    Differs from the reference code, which takes the softmax in the base output's dtype.
    """

    def __init__(self, in_features: int, plan: LayerPlan) -> None:
        super().__init__(in_features, plan)
        self.weight = nn.Parameter(torch.empty(plan.num_experts, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """`torch.nn.Linear`'s own initialisation, as the reference code has it."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x_TI: Tensor) -> Routing:
        """Route T tokens: weights (T, E), fp32 or wider, k of a row non-zero, summing to 1."""
        logits_TE = torch.nn.functional.linear(x_TI, self.weight)
        probs_TE = torch.softmax(
            logits_TE, dim=-1, dtype=torch.promote_types(logits_TE.dtype, torch.float32)
        )
        kept_TK, ids_TK = torch.topk(probs_TE, self.plan.top_k, dim=-1)
        weights_TE = torch.zeros_like(probs_TE).scatter(
            -1, ids_TK, kept_TK / kept_TK.sum(-1, keepdim=True)
        )
        return Routing(logits=logits_TE, probs=probs_TE, weights=weights_TE, expert_ids=ids_TK)

    def static_weights(self) -> Tensor | None:
        """One expert always has gate 1; with more the gates follow the input."""
        return self.weight.new_ones(1) if self.plan.num_experts == 1 else None
