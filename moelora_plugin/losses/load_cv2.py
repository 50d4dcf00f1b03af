"""The load loss of the sparsely gated mixture of experts.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from torch import Tensor

from .base import LossInput, cv_squared, mean_over_tokens


def load_cv2(inputs: LossInput) -> Tensor:
    """CV^2 of each expert's load     (arXiv 1701.06538, eq. 10 and 11).

    The load is a smooth count of the tokens that select the expert: the sum over tokens of the
    probability that it is selected when its noise is drawn anew, which the router "noisy_topk"
    gives as `extras["load_probability"]`. Routers without noise have no such probability; there the
    sum of `routing.probs` takes its place, which is the gates before selection. Evenly spread, the
    loss is 0.
    """
    routing = inputs.routing
    load_TE = routing.extras.get("load_probability", routing.probs).to(routing.probs.dtype)
    return cv_squared(mean_over_tokens(load_TE, inputs.real))
