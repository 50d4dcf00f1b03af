"""The router z-loss, which keeps logits small.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LossInput, mean_over_tokens


def z(inputs: LossInput) -> Tensor:
    """Mean over tokens of (log sum_e exp logit_e)^2     (ST-MoE, arXiv 2202.08906, eq. 5)."""
    logits_TE = inputs.routing.logits.to(inputs.routing.probs.dtype)
    squares_T1 = torch.logsumexp(logits_TE, -1, keepdim=True).square()
    return mean_over_tokens(squares_T1, inputs.real).sum()
