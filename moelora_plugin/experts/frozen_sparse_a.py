"""A frozen sparse random A, of which only B trains.

Shape suffixes: I in, O out, E experts, R total rank, P non-zeros in a row of A.
"""

from __future__ import annotations

import torch
from torch import nn

from ..errors import ConfigError
from ..types import LayerPlan
from .base import Tensors
from .lora import LoraExperts


class FrozenSparseAExperts(LoraExperts):
    """E_i(x) = s B_i A_i x with a frozen sparse A (FlyLoRA, arXiv 2510.08396).

    Each row of A has P = max(1, floor(I * density)) non-zeros in random places, drawn from N(0,
    1/R^2). In the paper every rank is an expert (`r=1`, or `r=num_experts` with `total_rank`), the
    router is the magnitude of A x with a balance bias (score "self_rank", modifier "balance_bias"),
    and selected experts weigh 1. A is kept dense; the sparsity saves no memory or time here.

    Riemannian metric: B_i's is the constant A_i A_i^T; A has none, since it does not move.

    Args:
        plan: the layer's experts.
        in_features: I.
        out_features: O.
        density: share of non-zeros in a row of A; top_k / num_experts where left out (the paper's
            and the published code's k / r).

    Raises:
        ConfigError: density is outside (0, 1].
    """

    def __init__(
        self, plan: LayerPlan, in_features: int, out_features: int, *, density: float | None = None
    ) -> None:
        super().__init__(plan, in_features, out_features)
        if density is not None and not 0 < density <= 1:
            raise ConfigError(f"expert_kwargs['density']={density!r} must be in (0, 1].")
        self.density = plan.top_k / plan.num_experts if density is None else density
        self.frozen = frozenset({"A"})

    def reset(self, tensors: Tensors) -> None:
        """Draw A; B is the initialisation's."""
        a_RI = tensors["A"]
        # floor(64 * (3 / 8)) is 24; the small number keeps rounding from making it 23.
        nonzero = max(1, int(self.in_features * self.density + 1e-9))
        places_RP = torch.rand_like(a_RI, dtype=torch.float32).topk(nonzero, -1).indices
        values_RP = a_RI.new_empty(places_RP.shape)
        nn.init.normal_(values_RP, std=1 / self.plan.total_rank)
        a_RI.zero_().scatter_(-1, places_RP, values_RP)
