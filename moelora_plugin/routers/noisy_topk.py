"""Top-k of logits with learned noise.

Shape suffixes: N rows, I in, E experts, K selected.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..types import LayerPlan, Rows
from .scores.base import widened
from .topk import TopKRouter


class NoisyTopKRouter(TopKRouter):
    """Shazeer et al. (arXiv 1701.06538, section 2.1 and appendix A).

        H_i = logit_i + sigma_i n_i,   sigma = softplus(W_noise x),   n ~ N(0, 1)   in training
        g   = softmax over the k largest H_i

    W_noise is zero at first. `logits` are those without noise. While training, the extra
    "load_probability" (N, E) is P(x, i) of eq. 8 and 9, smooth in the logits: how likely expert i
    is selected if its own noise alone is drawn again. Its sum over rows is the load in the paper's
    load loss. Without noise (in evaluation) P is the selection itself and is not given; so it is
    where all experts are selected.

    Args:
        in_features: I.
        plan: the layer's experts; `top_k` of them are selected.
    """

    reads_input = True
    random = True

    def __init__(self, in_features: int, plan: LayerPlan) -> None:
        super().__init__(in_features, plan)
        self.noise_weight = nn.Parameter(torch.empty(plan.num_experts, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """No preference for any row at first: zeros, as in the paper."""
        nn.init.zeros_(self.noise_weight)

    def adjust(self, logits_NE: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        """The noisy logits, and the load's probability."""
        if not self.training:
            return logits_NE, {}
        raw_NE = torch.nn.functional.linear(self.features(rows), self.noise_weight)
        sigma_NE = torch.nn.functional.softplus(widened(raw_NE))
        logits_NE = widened(logits_NE)
        noisy_NE = logits_NE + sigma_NE * torch.randn_like(sigma_NE)
        if self.plan.top_k == self.plan.num_experts:
            return noisy_NE, {}
        # The k-th largest of the others is the (k+1)-th of all where the expert is among the k.
        top_NK = noisy_NE.topk(self.plan.top_k + 1, dim=-1).values
        within_N1, outside_N1 = top_NK[:, -2:-1], top_NK[:, -1:]
        others_NE = torch.where(noisy_NE >= within_N1, outside_N1, within_N1)
        # Next to no noise makes P a step, whose gradient must be 0 and not 0 times infinity.
        smallest = torch.finfo(sigma_NE.dtype).eps
        z_NE = (logits_NE - others_NE) / sigma_NE.clamp(min=smallest)
        return noisy_NE, {"load_probability": torch.special.ndtr(z_NE)}
