"""What every auxiliary loss is: a function of one layer's routing and experts.

Shape suffixes: T tokens, E experts, O out, X any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..types import Routing


@dataclass(frozen=True)
class LossInput:
    """What a loss may read.

    Attributes:
        routing: the layer's routing, with its graph.
        real: True where a token is not padding (T,); None where all are.
        ids: ids of each token's sequence (T,) by name ("task_id"), where the call brought them.
        experts: gives (A_i, B_i) per expert, with their graph.
        outputs: gives each expert's own output s B_i A_i x (T, E, O), with its graph; large.
    """

    routing: Routing
    real: Tensor | None = None
    ids: Mapping[str, Tensor] = field(default_factory=dict)
    experts: Callable[[], Sequence[tuple[Tensor, Tensor]]] = list
    outputs: Callable[[], Tensor] | None = None


# Options are keyword-only parameters and stand beside the coefficient in `aux_losses`.
AuxLoss = Callable[..., Tensor]


def mean_over_tokens(values_TX: Tensor, real_T: Tensor | None) -> Tensor:
    """The mean of each column over the real tokens, (X,).

    Weighted, not indexed: a shape that depends on the data would break compiled graphs and make an
    accelerator wait.
    """
    if real_T is None:
        return values_TX.mean(0)
    real_T = real_T.to(values_TX.dtype)
    return (values_TX * real_T.unsqueeze(-1)).sum(0) / real_T.sum().clamp(min=1)
