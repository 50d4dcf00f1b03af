"""The load balancing loss of Switch Transformers, in the form that Mixtral and MixLoRA use.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from torch import Tensor

from .base import LossInput, mean_over_tokens, require_option


def switch_lb(inputs: LossInput, *, share: str = "tokens") -> Tensor:
    """E * sum_e f_e P_e     (arXiv 2101.03961, eq. 4; with top-k as in arXiv 2404.15159, eq. 6).

    f_e is the share of the tokens that select expert e, which has no gradient, and P_e the mean of
    its probability. Evenly spread, the loss is K, the number of experts that a token selects; at
    worst it is E.

    Args:
        inputs: the layer's routing.
        share: what f_e is a share of: "tokens", or "selections", which divides by all selections of
            all tokens (LD-MoLE, whose tokens select different numbers of experts); evenly spread,
            the loss is then 1.

    Raises:
        ConfigError: another `share`.
    """
    known = ("tokens", "selections")
    require_option(share in known, "switch_lb.share", share, " or ".join(map(repr, known)))
    routing, real_T = inputs.routing, inputs.real
    probs_TE = routing.probs
    if "threshold" in routing.extras:
        # AdaMoLE's loss sees what lies above its learned threshold, which it so balances as well.
        probs_TE = probs_TE - routing.extras["threshold"].unsqueeze(-1)
    selected_TE = (routing.weights > 0).to(routing.probs.dtype)
    share_E = mean_over_tokens(selected_TE, real_T)
    if share == "selections":
        # A mean over tokens of at least one selection each; 0 only where all tokens are padding.
        total = share_E.sum()
        share_E = share_E / total.where(total > 0, total.new_ones(()))
    return probs_TE.shape[-1] * (share_E * mean_over_tokens(probs_TE, real_T)).sum()
