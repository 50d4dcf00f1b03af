"""Top-k of a balanced assignment.

Shape suffixes: N rows, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..types import LayerPlan, Rows
from ..values import MAX_ROUNDS
from .scores.base import widened
from .topk import TopKRouter


class SinkhornRouter(TopKRouter):
    """S-BASE (arXiv 2202.01169): while training, select by an assignment with equal loads.

    Sinkhorn's algorithm scales the rows of exp(logits) to equal sums and its columns to equal
    sums, in turn. The selection goes by the result, the gates are the probabilities softmax(logits)
    of what was selected, and no gradient passes through the iterations. In evaluation the selection
    goes by the logits, so that a row's gates are its own. Padding takes no part. Under DDP each
    process balances its own rows. A balance bias acts in evaluation only: scaled to equal sums, the
    columns lose it again.

    Differs from the paper, which iterates to a tolerance and has top-1 only.

    Args:
        in_features: I.
        plan: the layer's experts; `top_k` of them are selected.
        renormalize: divide the kept gates by their sum; with top-1 that leaves the logits without
            a gradient.
        iterations: of Sinkhorn's algorithm, at least 1.

    Raises:
        ConfigError: an option out of range.
    """

    mixes_rows = True
    balances = True

    def __init__(
        self,
        in_features: int,
        plan: LayerPlan,
        *,
        renormalize: bool = False,
        iterations: int = 8,
    ) -> None:
        super().__init__(in_features, plan, renormalize=renormalize)
        if not 1 <= iterations <= MAX_ROUNDS:
            raise ConfigError(
                f"router_kwargs['iterations']={iterations!r} must be from 1 to {MAX_ROUNDS:,}."
            )
        self.iterations = iterations

    def preference(
        self, scores_NE: Tensor, probs_NE: Tensor, extras: dict[str, Tensor], rows: Rows
    ) -> Tensor:
        """The logarithm of the balanced assignment while training, else as top-k."""
        if not self.training:
            return super().preference(scores_NE, probs_NE, extras, rows)
        return sinkhorn(scores_NE.detach(), rows.real, self.iterations)


def sinkhorn(scores_NE: Tensor, real_N: Tensor | None, iterations: int) -> Tensor:
    """The logarithm of exp(scores) scaled to equal row sums and equal column sums, plus a constant.

    In logarithms, where nothing overflows. Rows that are not real have no say in the columns.
    """
    log_NE = widened(scores_NE)
    for _ in range(iterations):
        log_NE = log_NE - torch.logsumexp(log_NE, -1, keepdim=True)
        counted_NE = log_NE
        if real_N is not None:
            counted_NE = log_NE.masked_fill(~real_N.unsqueeze(-1), -float("inf"))
        log_NE = log_NE - torch.logsumexp(counted_NE, 0, keepdim=True)
    return log_NE
