"""Experts choose rows.

Shape suffixes: N rows, B sequences, S rows of a sequence, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..types import Documents, LayerPlan, Rows
from .base import Router, softmax_wide


class ExpertChoiceRouter(Router):
    """Expert choice (arXiv 2202.09368): each expert takes the rows that like it most.

    Of the n rows of a sequence that are not padding, each expert takes the n c / E (rounded, at
    least 1) with the largest softmax(logits) for it; that probability is the gate. So every expert
    has the same load, and a row may have all experts or none.

    Each sequence is on its own, where the paper takes a batch: what else is in the batch makes no
    difference. But a row's gates depend on later rows, which a language model that generates does
    not have yet: with one new row at a time every expert takes it. Use it for encoders and scoring,
    or expect training and generation to differ.

    Args:
        in_features: I.
        plan: the layer's experts.
        capacity_factor: c, experts per row on average, positive; `top_k` where left out.

    Raises:
        ConfigError: the factor is not positive.
    """

    mixes_rows = True

    def __init__(
        self, in_features: int, plan: LayerPlan, *, capacity_factor: float | None = None
    ) -> None:
        super().__init__(in_features, plan)
        if capacity_factor is not None and not capacity_factor > 0:
            raise ConfigError(
                f"router_kwargs['capacity_factor']={capacity_factor!r} must be positive."
            )
        self.capacity_factor = plan.top_k if capacity_factor is None else capacity_factor

    def probabilities(self, scores_NE: Tensor, rows: Rows) -> Tensor:
        """Softmax over all experts."""
        return softmax_wide(scores_NE)

    def select(
        self, probs_NE: Tensor, preference_NE: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor | None]:
        """Zero where a row was not taken."""
        if rows.documents is not None:
            taken_NE = self._taken_of_documents(preference_NE, rows.real, rows.documents)
            return probs_NE * taken_NE.to(probs_NE.dtype), None
        preference_BSE = preference_NE.unflatten(0, (rows.batch, -1))
        if rows.real is None:
            real_BS = preference_BSE.new_ones(preference_BSE.shape[:2], dtype=torch.bool)
        else:
            real_BS = rows.real.unflatten(0, (rows.batch, -1))
        capacity_B = self._capacity(real_BS.sum(-1))
        preference_BSE = preference_BSE.masked_fill(~real_BS.unsqueeze(-1), -float("inf"))
        order_BSE = preference_BSE.argsort(dim=1, descending=True, stable=True)
        place_BSE = order_BSE.argsort(dim=1)  # the inverse permutation
        taken_BSE = (place_BSE < capacity_B[:, None, None]) & real_BS.unsqueeze(-1)
        return probs_NE * taken_BSE.flatten(0, 1).to(probs_NE.dtype), None

    def _capacity(self, rows_B: Tensor) -> Tensor:
        """How many of so many rows of a sequence an expert takes."""
        return (rows_B * (self.capacity_factor / self.plan.num_experts)).round().clamp(min=1)

    def _taken_of_documents(
        self, preference_NE: Tensor, real_N: Tensor | None, documents: Documents
    ) -> Tensor:
        """The same for sequences of different lengths, one after the other."""
        of_N = documents.of_T
        if real_N is None:
            real_N = torch.ones_like(of_N, dtype=torch.bool)
        capacity_D = self._capacity(of_N[real_N].bincount(minlength=documents.count))
        preference_NE = preference_NE.masked_fill(~real_N.unsqueeze(-1), -float("inf"))
        order_NE = preference_NE.argsort(dim=0, descending=True, stable=True)
        # Stable: within a document the order by preference stays.
        by_document_NE = of_N[order_NE].argsort(dim=0, stable=True)
        order_NE = order_NE.gather(0, by_document_NE)
        place_NE = order_NE.argsort(dim=0) - documents.first_D[of_N].unsqueeze(-1)
        return (place_NE < capacity_D[of_N].unsqueeze(-1)) & real_N.unsqueeze(-1)

    @property
    def experts_per_row(self) -> float:
        """The capacity factor, which is what it says."""
        return self.capacity_factor

    def fixed_weights(self) -> Tensor | None:
        """One expert that takes every row always has gate 1."""
        return self.one_expert() if self.capacity_factor >= 1 else None
