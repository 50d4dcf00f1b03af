"""What every auxiliary loss is: a function of one layer's routing.

Shape suffixes: T tokens, E experts, X any.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..types import Routing

# (routing, real_T) -> scalar. real_T (T,): True where a token is not padding; None where all are.
AuxLoss = Callable[[Routing, "Tensor | None"], Tensor]


def mean_over_tokens(values_TX: Tensor, real_T: Tensor | None) -> Tensor:
    """The mean of each column over the real tokens, (X,).

    Weighted, not indexed: a shape that depends on the data would break compiled graphs and make an
    accelerator wait.
    """
    if real_T is None:
        return values_TX.mean(0)
    real_T = real_T.to(values_TX.dtype)
    return (values_TX * real_T.unsqueeze(-1)).sum(0) / real_T.sum().clamp(min=1)
