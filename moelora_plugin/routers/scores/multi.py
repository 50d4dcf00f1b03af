"""Several gates and one that weighs them.

Shape suffixes: N rows, I in, E experts, M sub-routers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...types import LayerPlan, Rows
from .base import Score, require_count, reset_linear, widened


class MultiScore(Score):
    """log sum_m main_m(x) softmax(sub_m(x)): Mixture of Routers (arXiv 2503.23362).

    M linear sub-routers each give a distribution over the experts, a linear main router weighs
    them. As the logits are the mixture's logarithm, a router that takes their softmax (topk,
    softmax, top_p) gets the mixture itself. In fp32 or wider.

    The abstract says that several sub-routers select jointly and that the main router determines
    their weights; whether the main router keeps all of them or its best only, and how many there
    are, was not found in the text at hand, so both are options.

    Args:
        in_features: I.
        plan: the layer's experts.
        num_routers: M.
        top: keep the sub-routers that the main router weighs most, renormalised; None keeps all.
    """

    def __init__(
        self,
        in_features: int,
        plan: LayerPlan,
        *,
        num_routers: int = 3,
        top: int | None = None,
    ) -> None:
        super().__init__(in_features, plan)
        require_count("num_routers", num_routers)
        if top is not None:
            require_count("top", top)
            if top > num_routers:
                raise ConfigError(
                    f"router_score_kwargs['top']={top} is more than num_routers={num_routers}; "
                    "lower it or leave it out."
                )
        self.num_routers, self.top = num_routers, top
        self.main = nn.Parameter(torch.empty(num_routers, in_features))
        self.sub = nn.Parameter(torch.empty(num_routers * plan.num_experts, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each router as a linear gate."""
        reset_linear(self.main)
        reset_linear(self.sub)

    def forward(self, rows: Rows, a: Tensor | None) -> Tensor:
        """Logits (N, E): log-probabilities of the mixture."""
        x_NI = self.features(rows)
        main_NM = widened(torch.nn.functional.linear(x_NI, self.main))
        sub_NME = widened(torch.nn.functional.linear(x_NI, self.sub)).unflatten(
            -1, (self.num_routers, self.plan.num_experts)
        )
        if self.top is not None:
            kept_NK = main_NM.topk(self.top, dim=-1).indices
            outside_NM = torch.ones_like(main_NM, dtype=torch.bool).scatter(-1, kept_NK, False)
            main_NM = main_NM.masked_fill(outside_NM, -torch.inf)
        log_main_NM1 = main_NM.log_softmax(-1).unsqueeze(-1)
        return torch.logsumexp(log_main_NM1 + sub_NME.log_softmax(-1), dim=-2)
