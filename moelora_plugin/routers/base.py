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
from torch import Tensor

from ..errors import ConfigError
from ..frozen import KeepsFrozen
from ..types import LayerPlan, Routing, Rows
from .modifiers import RouterModifiers
from .scores import Score
from .scores.base import widened


class Router(KeepsFrozen, ABC):
    """Logits -> gates, for one target module.

    The stages are `adjust`, `probabilities`, `preference` and `select`; most routers need the
    second and the last only. A gate is exactly zero where an expert is not selected, and a row
    whose logits hold NaN touches no other row unless `mixes_rows`.

    Options are keyword-only parameters of the constructor and stand under `router_kwargs` in the
    configuration. Parameters, where there are any, are direct attributes (no submodules): PEFT
    strips the adapter's name from a state-dict key only where it is the last or the last but one
    part (`moelora_router.<adapter>.<parameter>`). Tensors that do not train are added by
    `register_frozen`, never as buffers.

    What follows declares where a router is an exception; contract tests and docs read it.

    Attributes:
        reads_input: whether the gates depend on more than the logits (`rows.x`).
        mixes_rows: whether a row's gates depend on the other rows (expert choice).
        random: whether a training forward draws random numbers.
        balances: whether a training forward balances the experts' load, as no evaluation does.
        by_preference: whether the selection goes by `preference`, where a balance bias acts.
        differentiable: whether the gates' gradient reaches the logits.

    Args:
        in_features: I.
        plan: the layer's experts.
    """

    reads_input = False
    mixes_rows = False
    random = False
    balances = False
    by_preference = False
    differentiable = True

    def __init__(self, in_features: int, plan: LayerPlan) -> None:
        super().__init__()
        self.in_features = in_features
        self.plan = plan

    def reset_parameters(self) -> None:
        """Draw the parameters afresh."""

    def adjust(self, logits_NE: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        """The scores (N, E) that the gates are made of, and further tensors (N, ...) for losses.

        The logits themselves unless a router has noise or a scale of its own.
        """
        return logits_NE, {}

    @abstractmethod
    def probabilities(self, scores_NE: Tensor, rows: Rows) -> Tensor:
        """Each expert's share or score (N, E), fp32 or wider; what losses read as `probs`."""

    def preference(
        self, scores_NE: Tensor, probs_NE: Tensor, extras: dict[str, Tensor], rows: Rows
    ) -> Tensor:
        """What a selection goes by (N, E), larger first: the probabilities.

        Args:
            scores_NE: what `adjust` gave, plus the balance bias where there is one.
            probs_NE: what `probabilities` gave, experts that dropped out being zero; where there is
                a balance bias the biased scores stand in for them.
            extras: what `adjust` gave.
            rows: what is decided about.
        """
        return probs_NE

    @abstractmethod
    def select(
        self, probs_NE: Tensor, preference_NE: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor | None]:
        """The gates (N, E), zero where not selected, and the selected experts (N, K) or None.

        Args:
            probs_NE: what `probabilities` gave, experts that dropped out being zero.
            preference_NE: what `preference` gave, experts that dropped out being -inf.
            rows: what is decided about.
        """

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

        Raises:
            ConfigError: a balance bias on a router whose selection it could not move.
        """
        rows = modifiers.on_input(rows)
        logits_NE = modifiers.on_logits(score(rows, a), rows)
        scores_NE, extras = self.adjust(logits_NE, rows)
        all_NE = self.probabilities(scores_NE, rows)
        probs_NE = modifiers.on_probs(all_NE, rows)
        bias_E = modifiers.selection_bias()
        if bias_E is None:
            preference_NE = self.preference(scores_NE, probs_NE, extras, rows)
        elif self.by_preference:
            biased_NE = scores_NE + bias_E
            preference_NE = self.preference(biased_NE, biased_NE, extras, rows)
        else:
            raise ConfigError(
                f"router_modifiers['balance_bias'] has no effect on {type(self).__name__}, which "
                "does not rank the experts of a row; leave it out or change router."
            )
        if probs_NE is not all_NE:
            dropped_NE = (probs_NE == 0) & (all_NE != 0)
            preference_NE = preference_NE.masked_fill(dropped_NE, -float("inf"))
        weights_NE, ids_NK = self.select(probs_NE, preference_NE, rows)
        weights_NE = modifiers.on_weights(weights_NE, rows)
        return Routing(logits_NE, probs_NE, weights_NE, ids_NK, extras)

    def fixed_weights(self) -> Tensor | None:
        """The gates (E,) where they are the same whatever the logits are; else None."""
        return None

    @property
    def experts_per_row(self) -> float | None:
        """How many experts a row has on average, if the others learn nothing from it; else None.

        They are the ones with gate 0, and what closed them passes no gradient: a mask does not, a
        straight-through estimate does. None where the number follows from the logits.
        """
        return None

    def one_expert(self) -> Tensor | None:
        """The gates where there is one expert and its share is always the whole; else None."""
        return torch.ones(1) if self.plan.num_experts == 1 else None

    def features(self, rows: Rows) -> Tensor:
        """What the rows are (N, I), for routers with parameters of their own.

        Raises:
            ConfigError: the router's input gives ids only.
        """
        if rows.x is None:
            raise ConfigError(
                f"{type(self).__name__} reads the features of what it routes, which this "
                "router_input does not have; use router_input='token' or 'sequence', or another "
                "router."
            )
        return rows.x


def softmax_wide(logits_NE: Tensor) -> Tensor:
    """Softmax in fp32 or wider whatever the logits' dtype."""
    return torch.softmax(widened(logits_NE), dim=-1)


def one_hot(ids_NK: Tensor, like_NE: Tensor) -> Tensor:
    """1 at the ids, 0 elsewhere (N, E), in the dtype of `like_NE`."""
    return torch.zeros_like(like_NE).scatter(-1, ids_NK, 1.0)


def share(weights_NE: Tensor) -> Tensor:
    """Each row over its sum; a row of zeros stays one, where 0 / 0 would be NaN."""
    total_N1 = weights_NE.sum(-1, keepdim=True)
    return weights_NE / total_N1.clamp(min=torch.finfo(total_N1.dtype).tiny)
