"""The load balancing loss of Switch Transformers, in the form that Mixtral and MixLoRA use.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from torch import Tensor

from .base import LossInput, mean_over_tokens


def switch_lb(inputs: LossInput) -> Tensor:
    """E * sum_e f_e P_e     (arXiv 2101.03961, eq. 4; with top-k as in arXiv 2404.15159, eq. 6).

    f_e is the share of the tokens that select expert e, which has no gradient, and P_e the mean of
    its probability. Evenly spread, the loss is K, the number of experts that a token selects; at
    worst it is E.
    """
    routing, real_T = inputs.routing, inputs.real
    selected_TE = (routing.weights > 0).to(routing.probs.dtype)
    share_E = mean_over_tokens(selected_TE, real_T)
    return routing.probs.shape[-1] * (share_E * mean_over_tokens(routing.probs, real_T)).sum()
