"""A projection on the simplex whose sparsity is learned.

Shape suffixes: N rows, I in, E experts, H hidden.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..types import LayerPlan, Rows
from .base import Router
from .scores.base import widened

_OUTPUT_BIAS = -2.5  # the reference code's


class SparsegenRouter(Router):
    """LD-MoLE (arXiv 2509.25684): the sparsegen of the logits u, with lambda(x) from an MLP.

        p = argmin ||p - u||^2 - lambda ||p||^2  over the simplex
          = max(u - tau, 0) / (1 - lambda)
          = sparsemax(u / (1 - lambda))

    with tau in closed form from the sorted logits. lambda -> 1 selects one expert, lambda -> -inf
    makes all equal; at least one is always selected.

        lambda(x) = log sigmoid(w2 relu(W1 x + b1) + b2) + 1 - eps      so that 1 - lambda >= eps

    `logits` are u, and the extra "lambda" (N,) is lambda. `top_k` of the plan is not read. The
    reference code has one MLP for all layers of an input width; here every layer has its own, since
    an adapter's parameters belong to its modules.

    Args:
        in_features: I.
        plan: the layer's experts.
        hidden: H.
        hidden_init: what b1 is at first. At the reference code's -2.5 hardly a hidden unit is on
            for features of unit size, so lambda starts as one constant and W1 is slow to learn; 0
            has half of them on.
        eps: the least that 1 - lambda can be, positive.

    Raises:
        ConfigError: an option out of range.
    """

    reads_input = True

    def __init__(
        self,
        in_features: int,
        plan: LayerPlan,
        *,
        hidden: int = 256,
        hidden_init: float = -2.5,
        eps: float = 0.01,
    ) -> None:
        super().__init__(in_features, plan)
        if hidden < 1:
            raise ConfigError(f"router_kwargs['hidden']={hidden!r} must be at least 1.")
        if not eps > 0:
            raise ConfigError(f"router_kwargs['eps']={eps!r} must be positive.")
        self.eps = eps
        self.hidden_init = hidden_init
        self.hidden_weight = nn.Parameter(torch.empty(hidden, in_features))
        self.hidden_bias = nn.Parameter(torch.empty(hidden))
        self.lambda_weight = nn.Parameter(torch.empty(1, hidden))
        self.lambda_bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the reference code: Kaiming weights and constant biases."""
        for weight in (self.hidden_weight, self.lambda_weight):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        nn.init.constant_(self.hidden_bias, self.hidden_init)
        nn.init.constant_(self.lambda_bias, _OUTPUT_BIAS)

    def adjust(self, logits_NE: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits over 1 - lambda, and lambda."""
        linear = torch.nn.functional.linear
        hidden_NH = linear(self.features(rows), self.hidden_weight, self.hidden_bias).relu()
        raw_N1 = widened(linear(hidden_NH, self.lambda_weight, self.lambda_bias))
        lambda_N1 = torch.nn.functional.logsigmoid(raw_N1) + (1 - self.eps)
        return widened(logits_NE) / (1 - lambda_N1), {"lambda": lambda_N1.squeeze(-1)}

    def probabilities(self, scores_NE: Tensor, rows: Rows) -> Tensor:
        """Sparsemax of the scores."""
        return sparsemax(scores_NE)

    def select(
        self, probs_NE: Tensor, preference_NE: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor | None]:
        """The probabilities, most of which are zero."""
        return probs_NE, None

    def fixed_weights(self) -> Tensor | None:
        """One expert always has gate 1."""
        return self.one_expert()


def sparsemax(scores_NE: Tensor) -> Tensor:
    """The point of the simplex nearest to the scores (arXiv 1602.02068, algorithm 1)."""
    # The projection does not see a shift of the row; without it tau would be of the scores' size
    # and p the difference of two large numbers.
    z_NE = scores_NE - scores_NE.amax(-1, keepdim=True)
    sorted_NE = z_NE.sort(dim=-1, descending=True).values
    count_E = torch.arange(1, z_NE.shape[-1] + 1, device=z_NE.device, dtype=z_NE.dtype)
    support_NE = (1 + count_E * sorted_NE > sorted_NE.cumsum(-1)).to(z_NE.dtype)
    tau_N1 = ((sorted_NE * support_NE).sum(-1, keepdim=True) - 1) / support_NE.sum(
        -1, keepdim=True
    ).clamp(min=1)
    return (z_NE - tau_N1).relu()
