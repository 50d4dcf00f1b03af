"""A limit on how many rows an expert takes.

Shape suffixes: N rows, B sequences, S rows of a sequence, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...types import Documents, LayerPlan, Rows
from .base import Modifier, number_in, options_of


class Capacity(Modifier):
    """Of each sequence an expert takes the first rows that select it, up to a capacity.

    The gate of what comes later is zero (Switch Transformers, arXiv 2101.03961, section 2.2; SiRA;
    MixLoRA's switch form has 32 tokens). Padding takes no room. As there, the limit holds in
    evaluation too; when a model generates with a cache each new token is a sequence of one, which
    never overflows.

    The published methods count over a batch or a device; here over a sequence, so that what else is
    in the batch makes no difference.

    Args:
        value: rows per expert and sequence, at least 1; or {"tokens": that}; or {"factor": f} for
            f K n / E (rounded up), n being the rows of the sequence that are not padding: f = 1
            leaves room for a perfectly even spread.
        plan: the layer's experts.
    """

    mixes_rows = True
    example = 2

    def __init__(self, value: Any, plan: LayerPlan) -> None:
        super().__init__(value, plan)
        options = options_of("capacity", value, "tokens", {"tokens": None, "factor": None})
        self.tokens, self.factor = options["tokens"], options["factor"]
        if (self.tokens is None) == (self.factor is None):
            raise ConfigError(
                f"router_modifiers['capacity']={value!r} must be a number of tokens, or a mapping "
                "with either 'tokens' or 'factor'."
            )
        if self.factor is None:
            number_in(
                "capacity",
                self.tokens,
                "a whole number of at least 1",
                lambda number: number >= 1 and number == int(number),
            )
        else:
            number_in(
                "capacity", self.factor, "a positive number", lambda number: 0 < number < math.inf
            )

    def on_weights(self, weights_NE: Tensor, rows: Rows, state: nn.Module) -> Tensor:
        """Zero from where an expert is full."""
        real_N = rows.real
        if real_N is None:
            real_N = torch.ones_like(weights_NE[:, 0], dtype=torch.bool)
        selected_NE = (weights_NE != 0) & real_N.unsqueeze(-1)
        room_NE: Tensor
        if rows.documents is not None:
            room_NE = self._room_in_documents(selected_NE, real_N, rows.documents)
            return weights_NE * room_NE.to(weights_NE.dtype)
        place_BSE = selected_NE.unflatten(0, (rows.batch, -1)).long().cumsum(1)
        count_B = real_N.unflatten(0, (rows.batch, -1)).sum(-1)
        room_NE = (place_BSE <= self._capacity(count_B)[:, None, None]).flatten(0, 1)
        return weights_NE * room_NE.to(weights_NE.dtype)

    def _capacity(self, count_B: Tensor) -> Tensor:
        """How many rows an expert takes of a sequence that has so many."""
        if self.factor is None:
            return torch.full_like(count_B, self.tokens)
        share = self.factor * self.plan.top_k / self.plan.num_experts
        capacity_B: Tensor = (share * count_B).ceil()
        return capacity_B

    def _room_in_documents(
        self, selected_NE: Tensor, real_N: Tensor, documents: Documents
    ) -> Tensor:
        """The same for sequences of different lengths, one after the other."""
        of_N, chosen_NE = documents.of_T, selected_NE.long()
        place_NE = chosen_NE.cumsum(0)
        place_NE = place_NE - (place_NE - chosen_NE)[documents.first_D][of_N]
        count_D = of_N[real_N].bincount(minlength=documents.count)
        room_NE: Tensor = place_NE <= self._capacity(count_D)[of_N].unsqueeze(-1)
        return room_NE
