"""Each expert by itself.

Shape suffixes: N rows, I in, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..types import LayerPlan, Rows
from .base import Router, share
from .scores.base import widened


class SigmoidRouter(Router):
    """MoA (arXiv 2506.05928): gates s = sigmoid(logits), which compete for nothing.

    Soft MoA has all of them. Sparse MoA keeps s_i where it reaches t(x) = t_max sigmoid(w x + b),
    unchanged and not normalised; t_max is 0.5 in the reference code. `top_k` of the plan is not
    read.

    The paper calls t learnable, but a comparison has no gradient and the reference code gives it
    none: w and b stay where they were drawn, so here they are frozen. With `straight_through` they
    train, the comparison's backward being that of s_i - t with respect to t.

    Poly (arXiv 2202.13914) divides s by its sum and, while training, draws s from a relaxed
    Bernoulli distribution of temperature 1: s = sigmoid(logit + log u - log(1 - u)), u ~ U(0, 1).

    Args:
        in_features: I.
        plan: the layer's experts.
        max_threshold: t_max, in (0, 1]; no threshold (Soft MoA) where left out.
        straight_through: train the threshold.
        normalize: divide the gates by their sum.
        relaxed: draw s while training.

    Raises:
        ConfigError: t_max out of range, or nothing to train.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        in_features: int,
        plan: LayerPlan,
        *,
        max_threshold: float | None = None,
        straight_through: bool = False,
        normalize: bool = False,
        relaxed: bool = False,
    ) -> None:
        super().__init__(in_features, plan)
        if max_threshold is None:
            if straight_through:
                raise ConfigError(
                    "router_kwargs['straight_through'] trains a threshold, and there is none; set "
                    "router_kwargs['max_threshold'], to 0.5 for instance."
                )
        elif not 0 < max_threshold <= 1:
            raise ConfigError(
                f"router_kwargs['max_threshold']={max_threshold!r} must be a number in (0, 1]."
            )
        self.max_threshold = max_threshold
        self.straight_through = straight_through
        self.normalize = normalize
        self.random = relaxed
        if max_threshold is not None:
            self.reads_input = True
            for name, shape in (("weight", (1, in_features)), ("bias", (1,))):
                if straight_through:
                    self.register_parameter(name, nn.Parameter(torch.empty(shape)))
                else:
                    self.register_frozen(name, torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `torch.nn.Linear` does."""
        if self.max_threshold is not None:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def adjust(self, logits_NE: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits, or with logistic noise; see `relaxed`."""
        if not (self.random and self.training):
            return logits_NE, {}
        # 0 has no logarithm; `rand` never gives 1.
        u_NE = torch.rand_like(widened(logits_NE)).clamp(min=torch.finfo(torch.float32).tiny)
        return logits_NE + u_NE.logit(), {}

    def probabilities(self, scores_NE: Tensor, rows: Rows) -> Tensor:
        """Sigmoid of the scores; they do not sum to 1."""
        return widened(scores_NE).sigmoid()

    def select(
        self, probs_NE: Tensor, preference_NE: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor | None]:
        """The scores that reach the threshold."""
        if self.max_threshold is None:
            return (share(probs_NE) if self.normalize else probs_NE), None
        raw_N1 = torch.nn.functional.linear(self.features(rows), self.weight, self.bias)
        threshold_N1 = self.max_threshold * widened(raw_N1).sigmoid()
        kept_NE = (preference_NE >= threshold_N1).to(probs_NE.dtype)
        if self.straight_through:
            kept_NE = kept_NE + (threshold_N1.detach() - threshold_N1)
        weights_NE = probs_NE * kept_NE
        return (share(weights_NE) if self.normalize else weights_NE), None
