"""The small values that layers, routers, allocations and optimizers pass to each other.

Those that a layer makes in every call are not frozen, since making a frozen one costs several times
as much, which shows where one token is decoded at a time. Nobody changes them all the same.

Shape suffixes: T tokens, E experts, K selected experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

GateRescale = Literal["none", "sqrt", "exact"]
GateRescaleScope = Literal["weights", "output"]
Shared = Literal["none", "a", "b"]
Frozen = Literal["none", "a", "b"]
OptimizerName = Literal["rsgd", "grsgd", "radamw", "gradamw"]


@dataclass(frozen=True)
class LayerPlan:
    """What one target module gets: the allocation's answer for it.

    Attributes:
        num_experts: E.
        top_k: experts selected for a token.
        ranks: rank of each expert; R is their sum.
        alpha: LoRA alpha.
        scale_rank: r in alpha / r; the mean rank of the experts where left out.
    """

    num_experts: int
    top_k: int
    ranks: tuple[int, ...]
    alpha: float
    scale_rank: float | None = None

    @property
    def total_rank(self) -> int:
        """R, the number of rows of the stacked A."""
        return sum(self.ranks)

    @property
    def is_uniform(self) -> bool:
        """Whether every expert has the same rank."""
        return len(set(self.ranks)) == 1

    def with_universal(self) -> LayerPlan:
        """The same with one more expert, of the first one's rank."""
        return replace(self, num_experts=self.num_experts + 1, ranks=(*self.ranks, self.ranks[0]))

    @property
    def mean_rank(self) -> float:
        """The r that the scale divides by."""
        return self.scale_rank or self.total_rank / self.num_experts

    def scaling(self, use_rslora: bool = False) -> float:
        """LoRA's own scale s: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return self.alpha / (math.sqrt(self.mean_rank) if use_rslora else self.mean_rank)


# Nobody changes it. Not a MappingProxyType, which torch 2.9 cannot trace.
_NO_EXTRAS: Mapping[str, torch.Tensor] = {}


class Routing:
    """A router's decision for T tokens.

    Args:
        logits: raw scores (T, E).
        probs: distribution over all experts (T, E), fp32 or wider, or what computes it where only
            losses and statistics read it.
        weights: gates after selection (T, E), zeros for experts that were not selected.
        expert_ids: the selected experts (T, K) where the router selects, else None.
        extras: further tensors (T, ...) that a router offers to losses, by name.
    """

    __slots__ = ("_probs", "expert_ids", "extras", "logits", "weights")

    def __init__(
        self,
        logits: torch.Tensor,
        probs: torch.Tensor | Callable[[], torch.Tensor],
        weights: torch.Tensor,
        expert_ids: torch.Tensor | None = None,
        extras: Mapping[str, torch.Tensor] = _NO_EXTRAS,
    ) -> None:
        self.logits = logits
        self._probs = probs
        self.weights = weights
        self.expert_ids = expert_ids
        self.extras = extras

    @property
    def probs(self) -> torch.Tensor:
        """The distribution over all experts (T, E)."""
        if callable(self._probs):
            self._probs = self._probs()
        return self._probs

    def with_weights(self, weights: torch.Tensor) -> Routing:
        """The same with other gates."""
        return Routing(self.logits, self._probs, weights, self.expert_ids, self.extras)

    def rows(self, index: torch.Tensor) -> Routing:
        """The decisions of the rows `index`, for example one row per sequence spread to tokens."""
        return self._map(lambda tensor: tensor.index_select(0, index))

    def detach(self) -> Routing:
        """The same without a graph."""
        return self._map(lambda tensor: tensor.detach())

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Routing:
        return Routing(
            function(self.logits),
            function(self.probs),
            function(self.weights),
            None if self.expert_ids is None else function(self.expert_ids),
            {name: function(tensor) for name, tensor in self.extras.items()},
        )


@dataclass(slots=True)
class Documents:
    """Sequences that lie one after the other in the rows of a batch (packing).

    Attributes:
        count: D.
        of_T: the number of each token's document (T,), which never falls.
    """

    count: int
    of_T: torch.Tensor

    @property
    def first_D(self) -> torch.Tensor:
        """The index of each document's first token (D,)."""
        sizes_D = self.of_T.bincount(minlength=self.count)
        return sizes_D.cumsum(0) - sizes_D


@dataclass(slots=True)
class Rows:
    """What a router decides about: tokens, sequences or ids. N rows.

    Attributes:
        x: features of each row (N, in), or None where the decision does not read the input.
        ids: task or cluster of each row (N,), where the router's input is one.
        real: True where a row is not padding (N,); None where all are.
        batch: the rows are those of `batch` sequences of equal length, in order.
        documents: which sequence each row belongs to, where that is not all that `batch` says.
        row_of_token: for each token its row (T,); None where every token is its own row.
        product: W x (N, E) for the matrix of a linear score, where it was to be had for less.
    """

    x: torch.Tensor | None
    ids: torch.Tensor | None = None
    real: torch.Tensor | None = None
    batch: int = 1
    documents: Documents | None = None
    row_of_token: torch.Tensor | None = None
    product: torch.Tensor | None = None


@dataclass(slots=True)
class Gates:
    """How the experts of a layer are mixed for T tokens.

    Attributes:
        weights: (T, E), zero for experts that were not selected.
        scaling: LoRA scale s.
        rescale: the exponent p of the gates in the experts' backward.
        scope: what x receives in the backward.
    """

    weights: torch.Tensor
    scaling: float
    rescale: GateRescale = "none"
    scope: GateRescaleScope = "weights"


@dataclass(slots=True)
class Projection:
    """A layer's input in the experts' ranks; see `ops.rank_gated.project`.

    Attributes:
        z: x A^T (T, R), or (T, r) where the experts share A; its gradient reaches A alone.
        logits: a linear gate's logits (T, E), where they were computed with z.
        z_of_input: of z's shape, without values: its gradient reaches x alone. None where x needs
            none.
    """

    z: torch.Tensor
    logits: torch.Tensor | None = None
    z_of_input: torch.Tensor | None = None


@dataclass(slots=True)
class ExpertInput:
    """What the experts of a linear work on.

    Attributes:
        x: (T, in), dropout applied; the layer's own input where `projection` is there instead.
        base_output: what the base made of the undropped x (T, out).
        base_weight: gives the base's weight (out, in); raises where it is quantised.
        training: whether the layer is in training mode, for dropout of an expert kind's own.
        projection: what the kind's `project` made of the layer's input, for kinds that have it.
        by_groups: whether the kind's `by_groups` said so.
    """

    x: torch.Tensor
    base_output: torch.Tensor
    base_weight: Callable[[], torch.Tensor]
    training: bool = False
    projection: Projection | None = None
    by_groups: bool = False


@dataclass(frozen=True)
class Place:
    """Where in the model a target module is.

    Attributes:
        name: its full name.
        layer: index of its decoder layer; None outside of any.
        num_layers: how many such layers the model has.
    """

    name: str
    layer: int | None = None
    num_layers: int = 0


@dataclass(frozen=True)
class ExpertPair:
    """The factors of one layer's experts, as the Riemannian optimizers take them.

    A factor that is frozen still gives its partner's metric.

    Attributes:
        a: stacked A (R, in), or one A (r, in) that all experts share.
        b: stacked B (out, R), or one B (out, r) that all experts share.
        ranks: rank of each expert.
        scaling: LoRA scale s.
        shared: which factor the experts share.
        frozen: which factor the expert kind never trains.
    """

    a: torch.Tensor
    b: torch.Tensor
    ranks: tuple[int, ...]
    scaling: float
    shared: Shared = "none"
    frozen: Frozen = "none"
