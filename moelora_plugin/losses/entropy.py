"""How undecided the router is about a token.

Shape suffixes: T tokens.
"""

from __future__ import annotations

from torch import Tensor

from .base import LossInput, mean_over_tokens, token_entropy


def entropy(inputs: LossInput, *, maximize: bool = False) -> Tensor:
    """Mean over tokens of the routing's entropy -sum_e p_e log p_e, in nats.

    Least (0) where every token is sure of one expert, most (log E) where all are alike. As a loss
    it makes decisions sharper; with `maximize` its negative does the opposite.

    Args:
        inputs: the layer's routing.
        maximize: return the negative.
    """
    mean = mean_over_tokens(token_entropy(inputs.routing.probs).unsqueeze(-1), inputs.real).sum()
    return -mean if maximize else mean
