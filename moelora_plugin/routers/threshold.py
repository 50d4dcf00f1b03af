"""The experts above a learned threshold.

Shape suffixes: N rows, I in, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..types import LayerPlan, Rows
from .base import Router, share, softmax_wide
from .scores.base import widened


class ThresholdRouter(Router):
    """AdaMoLE (arXiv 2405.00361): experts whose probability reaches t(x), by how far they do.

        p = softmax(logits),  t(x) = t_max sigmoid(w x + b)
        g_i = max(p_i - t, 0) / sum_j max(p_j - t, 0)

    With t_max at most 1/E some expert always reaches t. Where none does (a larger t_max), all gates
    are zero. Where those that do only just reach it, so that every difference is zero, they share
    evenly: the reference code gives zero there, but then even a single expert could close.

    `probs` are p, and the extra "threshold" (N,) is t: the reference code's balance loss takes the
    mean of p_i - t as P_i, which teaches t as well. `top_k` of the plan is not read.

    Args:
        in_features: I.
        plan: the layer's experts.
        max_threshold: t_max, in (0, 1]; 1/E where left out.

    Raises:
        ConfigError: t_max out of range.
    """

    reads_input = True

    def __init__(
        self, in_features: int, plan: LayerPlan, *, max_threshold: float | None = None
    ) -> None:
        super().__init__(in_features, plan)
        if max_threshold is not None and not 0 < max_threshold <= 1:
            raise ConfigError(
                f"router_kwargs['max_threshold']={max_threshold!r} must be a number in (0, 1]."
            )
        self.max_threshold = 1 / plan.num_experts if max_threshold is None else max_threshold
        self.weight = nn.Parameter(torch.empty(1, in_features))
        self.bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `torch.nn.Linear` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.bias, -bound, bound)

    def adjust(self, logits_NE: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits, and t(x)."""
        raw_N1 = torch.nn.functional.linear(self.features(rows), self.weight, self.bias)
        return logits_NE, {"threshold": self.max_threshold * widened(raw_N1).sigmoid().squeeze(-1)}

    def probabilities(self, scores_NE: Tensor, rows: Rows) -> Tensor:
        """Softmax over all experts."""
        return softmax_wide(scores_NE)

    def preference(
        self, scores_NE: Tensor, probs_NE: Tensor, extras: dict[str, Tensor], rows: Rows
    ) -> Tensor:
        """How far each expert is above the threshold."""
        return probs_NE - extras["threshold"].unsqueeze(-1)

    def select(
        self, probs_NE: Tensor, preference_NE: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor | None]:
        """See the class; a dropped expert's preference is -inf and its gate zero."""
        above_NE = preference_NE.relu()
        reached_NE = (preference_NE >= 0).to(above_NE.dtype)
        level_N1 = above_NE.sum(-1, keepdim=True) == 0
        return share(torch.where(level_N1, reached_NE, above_NE)), None

    def fixed_weights(self) -> Tensor | None:
        """One expert always has gate 1."""
        return self.one_expert()
