"""As many experts as it takes to reach a probability.

Shape suffixes: N rows, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..types import LayerPlan, Rows
from .base import Router, share, softmax_wide


class TopPRouter(Router):
    """The likeliest experts until their probabilities sum to p (Dynamic MoE, arXiv 2403.07652).

    The expert that crosses p is included, so at least one always is. `top_k` of the plan is not
    read. MixLoRA's dynamic form (its code: p = 0.8) does not renormalise.

    Args:
        in_features: I.
        plan: the layer's experts.
        p: the probability to reach, in (0, 1].
        renormalize: divide the kept gates by their sum.

    Raises:
        ConfigError: p out of range.
    """

    by_preference = True

    def __init__(
        self, in_features: int, plan: LayerPlan, *, p: float = 0.8, renormalize: bool = False
    ) -> None:
        super().__init__(in_features, plan)
        if not 0 < p <= 1:
            raise ConfigError(f"router_kwargs['p']={p!r} must be a number in (0, 1].")
        self.p = p
        self.renormalize = renormalize

    def probabilities(self, scores_NE: Tensor, rows: Rows) -> Tensor:
        """Softmax over all experts."""
        return softmax_wide(scores_NE)

    def select(
        self, probs_NE: Tensor, preference_NE: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor | None]:
        """Zero for experts that come after p is reached."""
        order_NE = preference_NE.argsort(dim=-1, descending=True, stable=True)
        sorted_NE = probs_NE.gather(-1, order_NE)
        before_NE = sorted_NE.cumsum(-1) - sorted_NE  # exactly 0 for the first
        kept_NE = (before_NE < self.p).to(probs_NE.dtype)
        # Times the mask, not `where`: NaN has to show.
        weights_NE = probs_NE * torch.zeros_like(probs_NE).scatter(-1, order_NE, kept_NE)
        return share(weights_NE) if self.renormalize else weights_NE, None

    def fixed_weights(self) -> Tensor | None:
        """One expert always has gate 1."""
        return self.one_expert()
