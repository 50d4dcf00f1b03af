"""Whether the parts of a router fit each other, seen without a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..call import ROUTING_IDS, Call
from ..types import Routing
from .base import Router
from .inputs import RouterInput
from .modifiers import RouterModifiers
from .scores import Score


def try_routing(
    router_input: RouterInput,
    score: Score,
    router: Router,
    pairs: Sequence[tuple[Tensor, Tensor]] | None,
    a: Tensor | None,
) -> Routing:
    """A decision about two sequences of two tokens, in a call that says all a call can say.

    It is called under `torch.device("meta")`.

    Args:
        router_input: what is decided about.
        score: the logits.
        router: the gates.
        pairs: (A_i, B_i) of each expert, where the score can read them.
        a: the experts' stacked A (R, in), likewise.

    Raises:
        ConfigError: one part needs what another does not give.
    """
    if pairs is not None:
        score.read_experts(pairs)
    call = Call(
        shape=(2, 2),
        prompt_BS=torch.ones(2, 2, dtype=torch.bool),
        ids={name: torch.zeros(2, dtype=torch.long) for name in ROUTING_IDS},
    )
    rows = router_input.rows(torch.empty(2, 2, router.in_features), call)
    routing: Routing = router(rows, score, RouterModifiers([]), a)
    return routing if rows.row_of_token is None else routing.rows(rows.row_of_token)
