"""Ranks that choose themselves.

Shape suffixes: N rows, I in, E experts of rank 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...errors import ConfigError
from ...types import LayerPlan, Rows
from .base import Score, require_choice, widened

_NORMALIZATIONS = ("none", "rows", "cosine")


class SelfRankScore(Score):
    """a_i . x for experts of rank 1: what the expert computes first is its score.

    FlyLoRA (arXiv 2510.08396) selects by |a_i . x|, with a frozen sparse A: this score and the topk
    router's `by="magnitude"`. The MoRA of "Little By Little" (arXiv 2506.21035) lets each rank
    infer its relevance from its activation, with a softmax of a temperature; how the activations
    are normalised was not found in the text at hand, so that is an option. In fp32 or wider.

    Args:
        in_features: I.
        plan: the layer's experts, each of rank 1.
        normalize: "none"; "rows" divides a row's scores by their Euclidean norm over the experts;
            "cosine" divides each by |a_i| |x|.

    Raises:
        ConfigError: an expert has another rank.
    """

    def __init__(
        self,
        in_features: int,
        plan: LayerPlan,
        *,
        normalize: str = "none",
    ) -> None:
        super().__init__(in_features, plan)
        require_choice("normalize", normalize, _NORMALIZATIONS)
        if set(plan.ranks) != {1}:
            raise ConfigError(
                "router_score='self_rank' needs experts of rank 1; set expert='rank', or r=1, or "
                "router_score='self_norm'."
            )
        self.normalize = normalize

    def reset_parameters(self) -> None:
        """There are none."""

    def forward(self, rows: Rows, a: Tensor | None) -> Tensor:
        """Logits (N, E)."""
        logits_NE = widened(torch.cat(self.expert_activations(rows, a), -1))
        if self.normalize == "rows":
            logits_NE = normalize(logits_NE, dim=-1)
        elif self.normalize == "cosine":
            assert a is not None
            lengths_E = torch.linalg.vector_norm(widened(a[: self.plan.total_rank]), dim=-1)
            lengths_N = torch.linalg.vector_norm(widened(self.features(rows)), dim=-1)
            product_NE = lengths_N.unsqueeze(-1) * lengths_E
            logits_NE = logits_NE / product_NE.clamp(min=1e-12)
        return logits_NE
