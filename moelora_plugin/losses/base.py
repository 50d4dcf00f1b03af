"""What every auxiliary loss is: a function of one layer's routing and experts.

Shape suffixes: T tokens, M some of them, E experts, O out, X any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..types import Documents, Routing


@dataclass(frozen=True)
class LossInput:
    """What a loss may read.

    Attributes:
        routing: the layer's routing, with its graph.
        real: True where a token is not padding (T,); None where all are.
        ids: ids of each token's sequence (T,) by name ("task_id"), where the call brought them.
        experts: gives (A_i, B_i) per expert, with their graph.
        outputs: gives each expert's own output s B_i A_i x (M, E, O) for the tokens whose indexes
            (M,) it is given, with its graph; None where the experts are elsewhere.
        batch: the tokens are those of `batch` sequences of equal length, in order.
        documents: which sequence each token belongs to, where that is not all that `batch` says.
    """

    routing: Routing
    real: Tensor | None = None
    ids: Mapping[str, Tensor] = field(default_factory=dict)
    experts: Callable[[], Sequence[tuple[Tensor, Tensor]]] = list
    outputs: Callable[[Tensor], Tensor] | None = None
    batch: int = 1
    documents: Documents | None = None


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


def cv_squared(values_X: Tensor, counts_X: Tensor | None = None, correction: int = 0) -> Tensor:
    """The squared coefficient of variation var / mean^2 of numbers that are not negative.

    Where the mean is 0 all numbers are, and the result is 0.

    Args:
        values_X: the numbers.
        counts_X: 1 for a number that counts, 0 for one that does not; None where all do.
        correction: the variance's sum of squares is divided by the number of values less this.
    """
    counts_X = torch.ones_like(values_X) if counts_X is None else counts_X.to(values_X.dtype)
    number = counts_X.sum()
    mean = (values_X * counts_X).sum() / number.clamp(min=1)
    squares = ((values_X - mean).square() * counts_X).sum()
    variance = squares / (number - correction).clamp(min=1)
    return variance / torch.where(mean > 0, mean, torch.ones_like(mean)).square()


def token_entropy(probs_TE: Tensor) -> Tensor:
    """The entropy -sum_e p_e log p_e of each token's routing, (T,).

    Scores that are no distribution (sigmoid, relu) are divided by their sum first; a token without
    any has entropy 0. An expert with p = 0 adds nothing and receives no gradient, where the
    formula's would be infinite.
    """
    tiny = torch.finfo(probs_TE.dtype).tiny
    shares_TE = probs_TE / probs_TE.sum(-1, keepdim=True).clamp(min=tiny)
    entropies_TE: Tensor = torch.special.entr(shares_TE.clamp(min=tiny))
    return entropies_TE.sum(-1)


def require_option(condition: bool, key: str, value: object, what: str) -> None:
    """Refuse an option's value.

    Args:
        condition: whether the value will do.
        key: loss and option, like "entropy.maximize".
        value: what was given.
        what: what it must be.

    Raises:
        ConfigError: it will not do.
    """
    if not condition:
        loss, _, option = key.partition(".")
        raise ConfigError(f"aux_losses[{loss!r}][{option!r}]={value!r} must be {what}.")


def on_nothing(
    loss: AuxLoss, options: Mapping[str, Any], given: LossInput | None
) -> Callable[[int], Tensor]:
    """A loss as a function of the number of experts, for trying its options without a model.

    It is called under `torch.device("meta")`.

    Args:
        loss: one of ours.
        options: its options.
        given: what a layer of the configuration gives it; where that cannot be told, it is given
            all that a loss may read.
    """

    def call(num_experts: int) -> Tensor:
        gates_TE, one_T = torch.empty(4, num_experts), torch.empty(4)
        extras = {"lambda": one_T, "threshold": one_T, "load_probability": gates_TE}
        pair = torch.empty(1, 8), torch.empty(8, 1)
        everything = LossInput(
            Routing(gates_TE, gates_TE, gates_TE, None, extras),
            experts=lambda: [pair, pair],
            outputs=lambda at_M: torch.empty(len(at_M), num_experts, 8),
        )
        ids = {"task_id": torch.empty(4, dtype=torch.long)}
        return loss(replace(given or everything, ids=ids), **options)

    return call
