"""One vector per expert that stands for what the expert is good at.

Shape suffixes: N rows, I in, O out, E experts, r one expert's rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from ...errors import ConfigError
from ...ops.arrow import arrow_prototypes
from ...types import LayerPlan, Rows
from .base import Score, require_choice, reset_linear, widened, without_autocast

_COMPARISONS = ("dot", "abs", "standardized")


class PrototypeScore(Score):
    """Compares x with a prototype v_i of each expert.

    By `compare`:
        "dot": v_i . x.
        "abs": |v_i . x|. Arrow (arXiv 2405.11157), where v_i is the top right singular vector of
            B_i A_i, whose sign means nothing.
        "standardized": std(v_i) . std(x) / sqrt(I), where std subtracts the mean and divides by
            the standard deviation. PHATGOOSE (arXiv 2402.05859), where v_i is the gate that was
            trained for expert i alone.

    Frozen prototypes are saved, not trained. Taking the experts as initial values
    (`init="adapters"`) fills them with Arrow's vectors, by an exact decomposition of size r where
    PEFT's Arrow takes 15 power iterations; a host that has prototypes of its own (PHATGOOSE's
    gates) copies them into `moelora_gate.<adapter>.prototypes`.

    Args:
        in_features: I.
        plan: the layer's experts.
        compare: "dot", "abs" or "standardized".
        trainable: train the prototypes.
    """

    def __init__(
        self,
        in_features: int,
        plan: LayerPlan,
        *,
        compare: str = "abs",
        trainable: bool = False,
    ) -> None:
        super().__init__(in_features, plan)
        require_choice("compare", compare, _COMPARISONS)
        self.compare = compare
        prototypes = torch.empty(plan.num_experts, in_features)
        if trainable:
            self.prototypes = nn.Parameter(prototypes)
        else:
            self.register_frozen("prototypes", prototypes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As a linear gate's."""
        reset_linear(self.prototypes)

    def read_experts(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take the direction to which each expert answers most.

        Raises:
            ConfigError: the experts are no such products.
        """
        # Not those of a universal expert, which nobody decides about.
        decided = pairs[: self.plan.num_experts]
        if not decided or decided[0][0].shape[1] != self.in_features:
            raise ConfigError(
                "router_score='prototype' takes each expert's main direction from its A and B, and "
                "these experts have none over the whole input; set expert='lora', or another "
                "router_score."
            )
        if not self.prototypes.is_meta:
            with torch.no_grad():
                self.prototypes.copy_(arrow_prototypes(decided))

    def forward(self, rows: Rows, a: Tensor | None) -> Tensor:
        """Logits (N, E)."""
        x_NI = self.features(rows)
        if self.compare != "standardized":
            logits_NE = torch.nn.functional.linear(x_NI, self.prototypes)
            return logits_NE.abs() if self.compare == "abs" else logits_NE
        shape = (self.in_features,)
        with without_autocast(x_NI):
            logits_NE = torch.nn.functional.linear(
                layer_norm(widened(x_NI), shape), layer_norm(widened(self.prototypes), shape)
            )
        return logits_NE / math.sqrt(self.in_features)
