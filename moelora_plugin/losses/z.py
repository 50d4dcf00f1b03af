"""The router z-loss, which keeps logits small.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Routing
from .base import mean_over_tokens


def z(routing: Routing, real_T: Tensor | None) -> Tensor:
    """Mean over tokens of (log sum_e exp logit_e)^2     (ST-MoE, arXiv 2202.08906, eq. 5)."""
    logits_TE = routing.logits.to(routing.probs.dtype)
    return mean_over_tokens(torch.logsumexp(logits_TE, -1, keepdim=True).square(), real_T).sum()
