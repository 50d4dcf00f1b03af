"""The importance loss of the sparsely gated mixture of experts.

Shape suffixes: E experts.
"""

from __future__ import annotations

from torch import Tensor

from .base import LossInput, cv_squared, mean_over_tokens


def importance_cv2(inputs: LossInput) -> Tensor:
    """CV^2 of each expert's summed gates     (arXiv 1701.06538, eq. 6 and 7).

    The gates are those after selection. Evenly spread, the loss is 0; at worst (one expert has
    everything) it is E - 1. It evens out gates, not numbers of tokens; for those see `load_cv2`.
    """
    weights_TE = inputs.routing.weights.to(inputs.routing.probs.dtype)
    return cv_squared(mean_over_tokens(weights_TE, inputs.real))
