"""One expert, whole.

Shape suffixes: N rows, E experts, K selected.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import ConfigError
from ..types import LayerPlan, Rows
from .base import Router, one_hot, softmax_wide


class HardRouter(Router):
    """LLaVA-MoLE (arXiv 2401.16160): the likeliest expert, with gate 1.

    The gate is not multiplied by the probability, so the task's loss teaches the router nothing;
    it learns from a balance loss on `probs`, or with `straight_through`.

    Args:
        in_features: I.
        plan: the layer's experts; `top_k` must be 1.
        straight_through: the gates' backward is that of the probabilities.

    Raises:
        ConfigError: `top_k` is not 1.
    """

    by_preference = True

    def __init__(
        self, in_features: int, plan: LayerPlan, *, straight_through: bool = False
    ) -> None:
        super().__init__(in_features, plan)
        if plan.top_k != 1:
            raise ConfigError(
                f"top_k={plan.top_k}, but router='hard' selects one expert; set top_k to 1, or use "
                "router='topk' with router_kwargs={'weight': 'one'}."
            )
        self.straight_through = straight_through
        self.differentiable = straight_through

    def probabilities(self, scores_NE: Tensor, rows: Rows) -> Tensor:
        """Softmax over all experts."""
        return softmax_wide(scores_NE)

    def select(
        self, probs_NE: Tensor, preference_NE: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor | None]:
        """A one-hot row."""
        ids_N1 = preference_NE.argmax(-1, keepdim=True)
        weights_NE = one_hot(ids_N1, probs_NE)
        if self.straight_through:
            weights_NE = weights_NE + (probs_NE - probs_NE.detach())
        return weights_NE, ids_N1

    @property
    def experts_per_row(self) -> float | None:
        """One, unless the gates' backward is that of all probabilities."""
        return None if self.straight_through else 1

    def fixed_weights(self) -> Tensor | None:
        """One expert always has gate 1."""
        return self.one_expert()
