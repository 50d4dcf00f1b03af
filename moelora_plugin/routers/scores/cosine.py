"""Direction instead of size: a gate on the unit sphere.

Shape suffixes: N rows, I in, E experts, D the width of the comparison.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ...errors import ConfigError
from ...types import LayerPlan, Rows
from .base import Score, require_count, reset_linear, widened, without_autocast

_MAX_SCALE = 100.0  # the least temperature is 0.01, as in Tutel's cosine gate


class CosineScore(Score):
    """cos(x, v_i) / tau with a learned temperature tau (X-MoE, arXiv 2204.09179, section 3.2).

    With `width`, x is first projected: cos(P x, v_i) / tau. The cosine is taken in fp32 or wider,
    and a row that is zero has the cosine 0 with everything. tau stays at or above 0.01.

    Args:
        in_features: I.
        plan: the layer's experts.
        width: D, the width of the projection; none where left out, so that D = I.
        temperature: tau at first. The paper's value was not checked; 0.07 is CLIP's.
    """

    def __init__(
        self,
        in_features: int,
        plan: LayerPlan,
        *,
        width: int | None = None,
        temperature: float = 0.07,
    ) -> None:
        super().__init__(in_features, plan)
        if not temperature >= 1 / _MAX_SCALE:
            raise ConfigError(
                f"router_score_kwargs['temperature']={temperature!r} must be at least "
                f"{1 / _MAX_SCALE}."
            )
        if width is not None:
            require_count("width", width)
        self.temperature = float(temperature)
        self.directions = nn.Parameter(torch.empty(plan.num_experts, width or in_features))
        self.projection = None if width is None else nn.Parameter(torch.empty(width, in_features))
        self.log_scale = nn.Parameter(torch.empty(1))  # log(1 / tau)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Directions and projection as a linear gate's; tau as configured."""
        reset_linear(self.directions)
        if self.projection is not None:
            reset_linear(self.projection)
        nn.init.constant_(self.log_scale, -math.log(self.temperature))

    def forward(self, rows: Rows, a: Tensor | None) -> Tensor:
        """Logits (N, E), fp32 or wider."""
        x = self.features(rows)
        if self.projection is not None:
            x = torch.nn.functional.linear(x, self.projection)
        scale = widened(self.log_scale).clamp(max=math.log(_MAX_SCALE)).exp()
        with without_autocast(x):
            cosine_NE = torch.nn.functional.linear(
                normalize(widened(x), dim=-1), normalize(widened(self.directions), dim=-1)
            )
        return cosine_NE * scale
