"""A limit on how many rows an expert takes.

Shape suffixes: N rows, B sequences, S rows of a sequence, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...types import LayerPlan, Rows
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
        place_BSE = selected_NE.unflatten(0, (rows.batch, -1)).long().cumsum(1)
        if self.factor is None:
            capacity_B = place_BSE.new_full((rows.batch,), self.tokens)
        else:
            count_B = real_N.unflatten(0, (rows.batch, -1)).sum(-1)
            share = self.factor * self.plan.top_k / self.plan.num_experts
            capacity_B = (share * count_B).ceil()
        room_NE: Tensor = (place_BSE <= capacity_B[:, None, None]).flatten(0, 1)
        return weights_NE * room_NE.to(weights_NE.dtype)
