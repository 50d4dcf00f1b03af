"""LoRA-Mixer's routing specialization loss: balance over the batch, entropy of each token.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

import math

from torch import Tensor

from .base import LossInput, mean_over_tokens, require_option, token_entropy


def rsl(inputs: LossInput, *, entropy: float = 0.1) -> Tensor:
    """sum_e P_e f_e - entropy * mean_t H(p_t)     (LoRA-Mixer, arXiv 2507.00029v2, eq. 5).

    P_e is the mean probability of expert e and f_e the share of the tokens that select it; the
    coefficient of the loss is the paper's alpha and coefficient times `entropy` its lambda.

    The paper subtracts the entropy, so minimising the loss raises it, while its text says that a
    lower entropy is what makes experts specialise. A negative `entropy` gives what the text says.

    Args:
        inputs: the layer's routing.
        entropy: lambda / alpha; the default is ours, no public code states the paper's.

    Raises:
        ConfigError: `entropy` is no finite number.
    """
    require_option(math.isfinite(entropy), "rsl.entropy", entropy, "a finite number")
    probs_TE, real_T = inputs.routing.probs, inputs.real
    selected_TE = (inputs.routing.weights > 0).to(probs_TE.dtype)
    share_E = mean_over_tokens(selected_TE, real_T)
    balance = (share_E * mean_over_tokens(probs_TE, real_T)).sum()
    return balance - entropy * mean_over_tokens(token_entropy(probs_TE).unsqueeze(-1), real_T).sum()
