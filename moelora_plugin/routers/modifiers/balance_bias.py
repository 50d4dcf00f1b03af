"""A bias on the selection that evens out the experts' load without a gradient.

Shape suffixes: N rows, E experts.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from ...ops.sharded import sharded_like, whole
from ...types import LayerPlan, Rows
from .base import Modifier, number_in, options_of


class BalanceBias(Modifier):
    """Loss-free balancing (arXiv 2408.15664): b_e moves by u sign(mean load - load of e).

    b is added to the logits for the selection; gates and losses do not see it (SMoRA,
    arXiv 2501.15103; FlyLoRA's d, arXiv 2510.08396, u = 1e-3). The load of an expert is the number
    of rows, padding apart, whose gate for it is open. In arXiv 2408.15664 the bias is added to the
    probabilities instead, so u is on another scale there.

    The loads of training forwards add up, over processes too, and move b before the next training
    call, never in a forward: a recomputation under activation checkpointing sees the b that its
    forward saw (as long as no other training call comes between a forward and its backward). It
    counts its rows a second time, which no sign notices. What a forward without gradient sees is
    not counted.

    The state is the whole number of moves, so that half precision loses none of them.

    Args:
        value: u, positive; or {"rate": u, "every": n} to move once in n training calls: the number
            of micro-batches in an update makes the load that of the whole batch.
        plan: the layer's experts.
    """

    example = 1e-3

    def __init__(self, value: Any, plan: LayerPlan) -> None:
        super().__init__(value, plan)
        options = options_of("balance_bias", value, "rate", {"rate": 1e-3, "every": 1})
        self.rate = number_in(
            "balance_bias", options["rate"], "positive", lambda number: 0 < number < math.inf
        )
        self.every = number_in(
            "balance_bias",
            options["every"],
            "a whole number of at least 1",
            lambda number: number >= 1 and number == int(number),
        )
        self.calls = 0
        self.load_E: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """How often each expert's bias has moved up, less how often down."""
        return {"balance_moves": torch.zeros(self.plan.num_experts, dtype=torch.long)}

    def selection_bias(self, state: nn.Module) -> Tensor | None:
        """Rate times moves."""
        return self.rate * _moves(state)

    def on_weights(self, weights_NE: Tensor, rows: Rows, state: nn.Module) -> Tensor:
        """Counts, and leaves the gates as they are."""
        if state.training and torch.is_grad_enabled():
            open_NE = weights_NE != 0
            if rows.real is not None:
                open_NE = open_NE & rows.real.unsqueeze(-1)
            load_E = open_NE.sum(0)
            self.load_E = load_E if self.load_E is None else self.load_E + load_E
        return weights_NE

    def before_call(self, state: nn.Module) -> None:
        """Move the bias by what was counted since it last moved."""
        due = self.calls > 0 and self.calls % self.every == 0
        self.calls += 1
        if not due:
            return
        state_E = _moves(state)
        moves_E = whole(state_E)  # FSDP2 shards it between the layers' forwards
        # All processes come here, those that counted nothing as well.
        load_E = torch.zeros_like(moves_E) if self.load_E is None else self.load_E
        self.load_E = None
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(load_E)
        # The sign of the mean less the load, in whole numbers.
        moves_E = moves_E + torch.sign(load_E.sum() - self.plan.num_experts * load_E)
        with torch.no_grad():
            state_E.copy_(sharded_like(moves_E, state_E))


def _moves(state: nn.Module) -> Tensor:
    return cast(Tensor, state.balance_moves)
