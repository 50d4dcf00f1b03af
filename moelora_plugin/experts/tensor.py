"""Factors whose rows are tensor products of short vectors.

Shape suffixes: I in, O out, E experts, R total rank (E r), N order; i and o are the lengths of the
short vectors, with i^N >= I; r is one expert's rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..types import ExpertInput, Gates, LayerPlan
from .base import Tensors
from .mixed_factors import MixedFactorExperts

# Vectors of length 2 make one of four thousand millions.
_MAX_ORDER = 32


class TensorExperts(MixedFactorExperts):
    """TensorPoly-I (arXiv 2405.16671): Poly over the ranks of an entangled tensor.

    Row k of A_i is the tensor product of N vectors of length ceil(I^(1/N)), cut to I entries; the
    columns of B_i likewise. The experts are the tensor ranks, and A = sum_i g_i A_i, B = sum_i g_i
    B_i are mixed as in `mixed_factors`: N (I^(1/N) + O^(1/N)) parameters per rank instead of I + O.

    Written from the abstract and from the published TLoRA code (microsoft/mttl). Not covered:
    TensorPoly-II, which routes every order of the tensor by itself; the layer norms of that code's
    order-2 tree. Our own choice: the vectors are drawn so that A's entries have LoRA's variance,
    and the last order of B starts at zero, so that the update does; the code draws all of them.

    Riemannian metric: not defined (see `mixed_factors`); the vectors train as ordinary parameters.

    Args:
        plan: the layer's experts, all of one rank.
        in_features: I.
        out_features: O.
        order: N, from 2 to 32.

    Raises:
        ConfigError: order is out of range.
    """

    def __init__(
        self, plan: LayerPlan, in_features: int, out_features: int, *, order: int = 2
    ) -> None:
        super().__init__(plan, in_features, out_features)
        if not 2 <= order <= _MAX_ORDER:
            raise ConfigError(f"expert_kwargs['order']={order!r} must be from 2 to {_MAX_ORDER}.")
        self.order = order

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The vectors: leaves_A (N, R, i), leaves_B (N, R, o)."""
        rank = self.plan.total_rank
        return {
            "leaves_A": (self.order, rank, _root(self.in_features, self.order)),
            "leaves_B": (self.order, rank, _root(self.out_features, self.order)),
        }

    def reset(self, tensors: Tensors) -> None:
        """Entries of the product have the variance 1 / (3 I) of LoRA's A; B is zero."""
        for name, width in (("leaves_A", self.in_features), ("leaves_B", self.out_features)):
            bound = math.sqrt(3 * (3 * width) ** (-1 / self.order))
            nn.init.uniform_(tensors[name], -bound, bound)
        nn.init.zeros_(tensors["leaves_B"][-1])

    def update(self, tensors: Tensors, inputs: ExpertInput, gates: Gates) -> Tensor:
        """As Poly, on the products."""
        return super().update(self._factors(tensors), inputs, gates)

    def split(self, tensors: Tensors) -> list[tuple[Tensor, Tensor]]:
        """None: the factors are products, of which there are no views."""
        return []

    def static_update(self, tensors: Tensors, weights_E: Tensor, scaling: float) -> Tensor:
        """As Poly, on the products."""
        return super().static_update(self._factors(tensors), weights_E, scaling)

    def _factors(self, tensors: Tensors) -> dict[str, Tensor]:
        """A (R, I) and B (O, R)."""
        a_RI = _product(tensors["leaves_A"], self.in_features)
        return {"A": a_RI, "B": _product(tensors["leaves_B"], self.out_features).T.contiguous()}


def _root(width: int, order: int) -> int:
    """The smallest whole number whose power reaches `width`."""
    root = max(1, int(width ** (1 / order)) - 1)
    while root**order < width:
        root += 1
    return root


def _product(leaves_NRi: Tensor, width: int) -> Tensor:
    """The tensor product over N, row by row, cut to `width` entries (R, width)."""
    product = leaves_NRi[0]
    for leaf_Ri in leaves_NRi[1:]:
        product = torch.einsum("ri,rj->rij", product, leaf_Ri).flatten(1)
    return product[:, :width]
