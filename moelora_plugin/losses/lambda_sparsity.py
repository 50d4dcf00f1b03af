"""LD-MoLE's sparsity control: it moves lambda, on which the number of active experts depends.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import ConfigError
from .base import LossInput, mean_over_tokens, require_option


def lambda_sparsity(inputs: LossInput, *, form: str = "analytic", k: int = 2) -> Tensor:
    """Penalise a lambda that keeps too many experts     (LD-MoLE, arXiv 2509.25684).

    With the logits u sorted downwards, sparsegen keeps at most k experts exactly where

        lambda >= lower(k) = 1 - (u_(1) + ... + u_(k) - k u_(k+1))

    The form "analytic" is the mean of relu(lower(k) - lambda), with u held fixed as in the
    reference code, so that only lambda is moved. The form "mean" is the mean of 1 - lambda.

    Args:
        inputs: the layer's routing, by the router "sparsegen".
        form: "analytic" or "mean".
        k: experts to keep at most, for "analytic"; at least 1 and less than num_experts.

    Raises:
        ConfigError: another router, another form, or k out of range.
    """
    known = ("analytic", "mean")
    require_option(form in known, "lambda_sparsity.form", form, " or ".join(map(repr, known)))
    routing = inputs.routing
    if "lambda" not in routing.extras:
        raise ConfigError(
            "aux_losses['lambda_sparsity'] needs a router that has a lambda; set router to "
            "'sparsegen'."
        )
    lambda_T = routing.extras["lambda"].to(routing.probs.dtype).reshape(-1)
    if form == "mean":
        penalty_T = 1 - lambda_T
    else:
        experts = routing.logits.shape[-1]
        what = f"an integer of at least 1 and less than num_experts={experts}"
        require_option(isinstance(k, int) and 1 <= k < experts, "lambda_sparsity.k", k, what)
        logits_TE = routing.logits.detach().to(routing.probs.dtype)
        sorted_TE = logits_TE.sort(-1, descending=True).values
        lower_T = 1 - (sorted_TE[:, :k].sum(-1) - k * sorted_TE[:, k])
        penalty_T = (lower_T - lambda_T).relu()
    return mean_over_tokens(penalty_T.unsqueeze(-1), inputs.real).sum()
