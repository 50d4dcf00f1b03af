"""What every router is.

A router is put together from parts that vary independently:

    input       what is decided about: tokens, sequences, the prompt, tasks    (`inputs/`)
    score       logits from it                                                 (`scores/`)
    router      gates from the logits                                          (this folder)
    modifiers   temperature, noise, capacity, ...                              (`modifiers/`)

Shape suffixes: N rows (tokens, unless the input says otherwise), I in, E experts, K selected.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..types import LayerPlan, Routing, Rows
from .modifiers import RouterModifiers
from .scores import Score


class Router(nn.Module, ABC):
    """Logits -> gates, for one target module.

    Options are keyword-only parameters of the constructor and stand under `router_kwargs` in the
    configuration. Parameters, where there are any, are direct attributes (no submodules): PEFT
    strips the adapter's name from a state-dict key only where it is the last or the last but one
    part (`moelora_router.<adapter>.<parameter>`).

    Attributes:
        reads_input: whether the gates depend on more than the logits (`rows.x`).
        mixes_rows: whether a row's gates depend on the other rows (expert choice).

    Args:
        in_features: I.
        plan: the layer's experts.
    """

    reads_input = False
    mixes_rows = False

    def __init__(self, in_features: int, plan: LayerPlan) -> None:
        super().__init__()
        self.in_features = in_features
        self.plan = plan

    def reset_parameters(self) -> None:
        """Draw the parameters afresh."""

    @abstractmethod
    def probabilities(self, logits_NE: Tensor, rows: Rows) -> Tensor:
        """Each expert's share or score (N, E), fp32 or wider; what losses read as `probs`."""

    @abstractmethod
    def select(
        self, probs_NE: Tensor, preference_NE: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor | None]:
        """The gates (N, E), zero where not selected, and the selected experts (N, K) or None.

        Args:
            probs_NE: what `probabilities` gave, experts that dropped out being zero.
            preference_NE: what a selection goes by; `probs_NE` unless a balance bias is on.
            rows: what is decided about.
        """

    def extras(self, logits_NE: Tensor, rows: Rows) -> dict[str, Tensor]:
        """Further tensors for losses."""
        return {}

    def forward(
        self,
        rows: Rows,
        score: Score,
        modifiers: RouterModifiers,
        a: Tensor | None = None,
    ) -> Routing:
        """Route N rows.

        Args:
            rows: what is decided about.
            score: gives the logits.
            modifiers: the adapter's.
            a: the experts' stacked A (R, I), for scores that read the experts' own activations.
        """
        rows = modifiers.on_input(rows)
        logits_NE = modifiers.on_logits(score(rows, a), rows)
        probs_NE = modifiers.on_probs(self.probabilities(logits_NE, rows), rows)
        preference_NE = modifiers.preference(logits_NE, probs_NE)
        weights_NE, ids_NK = self.select(probs_NE, preference_NE, rows)
        weights_NE = modifiers.on_weights(weights_NE, rows)
        return Routing(logits_NE, probs_NE, weights_NE, ids_NK, self.extras(logits_NE, rows))

    def fixed_weights(self) -> Tensor | None:
        """The gates (E,) where they are the same whatever the logits are; else None."""
        return None


def softmax_wide(logits_NE: Tensor) -> Tensor:
    """Softmax in fp32 or wider whatever the logits' dtype."""
    return torch.softmax(
        logits_NE, dim=-1, dtype=torch.promote_types(logits_NE.dtype, torch.float32)
    )
