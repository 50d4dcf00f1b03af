"""Keep the top k of a softmax.

Shape suffixes: N rows, E experts, K selected.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import ConfigError
from ..types import LayerPlan, Routing, Rows
from .base import Router, one_hot, share, softmax_wide
from .modifiers import RouterModifiers
from .scores import Score
from .scores.base import widened

Weight = Literal["probability", "one"]
Order = Literal["probability", "magnitude"]


class TopKRouter(Router):
    """The paper's router (arXiv 2502.15828, section 4.1): top-k of softmax(logits), renormalised.

    The softmax runs in fp32 or wider. Exactly k experts are selected per row, ties included (which
    of the tied experts is `torch.topk`'s choice). A row whose logits hold NaN gets NaN gates, so
    the fault shows in the loss; it does not touch other rows.

    There is no option for a softmax after the selection: over the k selected logits it is the
    softmax over all, renormalised, which is `renormalize=True`.

    Differs from the reference code, which takes the softmax in the base output's dtype.

    Args:
        in_features: I.
        plan: the layer's experts; `top_k` of them are selected.
        renormalize: divide the kept gates by their sum. With it the gates are those of a softmax
            over the selected logits alone.
        weight: the gate of a selected expert: its "probability", or "one", through which no
            gradient reaches the logits (FlyLoRA, arXiv 2510.08396).
        by: what the selection goes by: the "probability", or the "magnitude" |logit|, of which the
            softmax is then taken (FlyLoRA: |A x + d|, d being the balance bias).

    Raises:
        ConfigError: an option that is none of these.
    """

    by_preference = True

    def __init__(
        self,
        in_features: int,
        plan: LayerPlan,
        *,
        renormalize: bool = True,
        weight: Weight = "probability",
        by: Order = "probability",
    ) -> None:
        super().__init__(in_features, plan)
        for key, value, choices in (("weight", weight, Weight), ("by", by, Order)):
            if value not in get_args(choices):
                raise ConfigError(
                    f"router_kwargs[{key!r}]={value!r} must be one of "
                    f"{', '.join(map(repr, get_args(choices)))}."
                )
        self.renormalize = renormalize
        self.weight = weight
        self.by = by
        self.differentiable = weight == "probability"
        # A subclass has stages of its own.
        self.is_softmax_of_selected = (
            type(self) is TopKRouter
            and renormalize
            and weight == "probability"
            and by == "probability"
        )

    def forward(
        self,
        rows: Rows,
        score: Score,
        modifiers: RouterModifiers,
        a: Tensor | None = None,
    ) -> Routing:
        """Route N rows.

        Where nothing acts between the stages, the softmax runs over the k selected logits alone:
        the same gates from fewer operations, and none that only losses would read.
        """
        if modifiers or not self.is_softmax_of_selected:
            return super().forward(rows, score, modifiers, a)
        logits_NE = score(rows, a)
        weights_NE, ids_NK = self.gates_of(logits_NE)
        return Routing(logits_NE, lambda: softmax_wide(logits_NE), weights_NE, ids_NK)

    def gates_of(self, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        """The gates (N, E) where `is_softmax_of_selected`, and the selected experts (N, K)."""
        wide_NE = widened(logits_NE)
        kept_NK, ids_NK = torch.topk(wide_NE, self.plan.top_k, dim=-1)
        kept_NK = torch.softmax(kept_NK, dim=-1)
        return torch.zeros_like(wide_NE).scatter_(-1, ids_NK, kept_NK), ids_NK

    def probabilities(self, scores_NE: Tensor, rows: Rows) -> Tensor:
        """Softmax over all experts."""
        return softmax_wide(scores_NE.abs() if self.by == "magnitude" else scores_NE)

    def preference(
        self, scores_NE: Tensor, probs_NE: Tensor, extras: dict[str, Tensor], rows: Rows
    ) -> Tensor:
        """See `by`."""
        return scores_NE.abs() if self.by == "magnitude" else probs_NE

    def select(
        self, probs_NE: Tensor, preference_NE: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor | None]:
        """With k of a row non-zero, summing to 1 if renormalised."""
        ids_NK = torch.topk(preference_NE, self.plan.top_k, dim=-1).indices
        if self.weight == "one":
            # Where fewer than k are left, those that dropped out fill up the k, with gate 0.
            return one_hot(ids_NK, probs_NE) * (preference_NE != -float("inf")), ids_NK
        kept_NK = probs_NE.gather(-1, ids_NK)
        if self.renormalize:
            kept_NK = share(kept_NK)
        return torch.zeros_like(probs_NE).scatter(-1, ids_NK, kept_NK), ids_NK

    @property
    def experts_per_row(self) -> float:
        """The k."""
        return self.plan.top_k

    def fixed_weights(self) -> Tensor | None:
        """One expert always has gate 1."""
        return self.one_expert()
