"""Factors that are mixed before x meets them: A = sum_i g_i A_i and B = sum_i g_i B_i, apart.

Shape suffixes: T tokens, I in, O out, E experts, R total rank; Q splits, S skills of a split, E = Q
S; i = I / Q and o = O / Q are one split's slices; r is one expert's rank.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ops.gate_rescale import rescaled_mixture
from ..types import ExpertInput, Gates, LayerPlan
from .base import ExpertKind, Tensors


class MixedFactorExperts(ExpertKind):
    """s (sum_i g_i B_i) (sum_i g_i A_i) x (Poly, arXiv 2202.13914; MHR, arXiv 2211.03831).

    With `n_splits` (MHR) the input and the output have as many slices, each with skills of its
    own: expert q S + k is skill k of slice q; A's mixture for slice q reads the q-th slice of x,
    B's writes the q-th slice of y, and the rank in between is shared. Gates are then divided by
    their sum in each slice, so that a router that normalises over all experts serves. PEFT's `poly`
    is this with the router input "task", sigmoid gates and `lora_alpha` 1.

    The per-token mixtures are never formed: x meets every A_i, and B_i the gated sum, at the cost
    of LoRA of rank R.

    Gate rescaling: pairs of experts i, j are weighed by g_i g_j, and the exponent is on that
    product. Riemannian metrics: not defined, since A_i acts with every B_j, so the experts'
    metrics would depend on the gates; A and B train as ordinary parameters.

    Args:
        plan: the layer's experts, all of one rank.
        in_features: I.
        out_features: O.
        n_splits: Q.

    Raises:
        ConfigError: n_splits does not divide I, O and num_experts.
    """

    def __init__(
        self, plan: LayerPlan, in_features: int, out_features: int, *, n_splits: int = 1
    ) -> None:
        super().__init__(plan, in_features, out_features)
        self.rank = self.uniform_rank()
        if n_splits < 1:
            raise ConfigError(f"expert_kwargs['n_splits']={n_splits!r} must be at least 1.")
        for what, width in (
            ("num_experts", plan.num_experts),
            ("a target module's width", in_features),
            ("a target module's width", out_features),
        ):
            if width % n_splits:
                raise ConfigError(
                    f"expert_kwargs['n_splits']={n_splits} does not divide {what} {width}; change "
                    "n_splits, or num_experts or target_modules."
                )
        self.n_splits = n_splits

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A is (R, i), B is (o, R)."""
        rank = self.plan.total_rank
        return {
            "A": (rank, self.in_features // self.n_splits),
            "B": (self.out_features // self.n_splits, rank),
        }

    def update(self, tensors: Tensors, inputs: ExpertInput, gates: Gates) -> Tensor:
        """Two products of LoRA's size at rank R."""
        gates = replace(gates, weights=self._shares(gates.weights))
        return rescaled_mixture(self._mixture, inputs, tensors, gates) * gates.scaling

    def _mixture(self, inputs: ExpertInput, tensors: Tensors, weights: list[Tensor]) -> Tensor:
        shares_TQS = weights[0].unflatten(-1, (self.n_splits, -1))
        x_TQi = inputs.x.unflatten(-1, (self.n_splits, -1))
        a_QSri = tensors["A"].view(*shares_TQS.shape[1:], self.rank, -1)
        b_oQSr = tensors["B"].view(-1, *shares_TQS.shape[1:], self.rank)
        z_TQSr = torch.einsum("tqi,qsri->tqsr", x_TQi, a_QSri)
        shares_TQS1 = shares_TQS.to(z_TQSr.dtype).unsqueeze(-1)
        z_Tr = (z_TQSr * shares_TQS1).sum((1, 2))
        h_TQSr = z_Tr[:, None, None] * shares_TQS1
        return torch.einsum("tqsr,oqsr->tqo", h_TQSr, b_oQSr).flatten(1)

    def _shares(self, weights: Tensor) -> Tensor:
        """The gates (..., E), of sum 1 in each slice where there are several."""
        if self.n_splits == 1:
            return weights
        shares: Tensor = weights.unflatten(-1, (self.n_splits, -1))
        # A slice without a selected skill contributes nothing.
        smallest = torch.finfo(shares.dtype).tiny
        total: Tensor = shares.sum(-1, keepdim=True)
        shares = shares / total.clamp(min=smallest)
        return shares.flatten(-2)

    def split(self, tensors: Tensors) -> list[tuple[Tensor, Tensor]]:
        """Views (A_i (r, i), B_i (o, r)), on one slice each."""
        return list(
            zip(tensors["A"].split(self.rank), tensors["B"].split(self.rank, 1), strict=True)
        )

    def static_update(self, tensors: Tensors, weights_E: Tensor, scaling: float) -> Tensor:
        """S B A of the mixed factors, (O, r) times (r, I)."""
        shares_E = self._shares(weights_E).to(tensors["A"].dtype)
        shares_QS = shares_E.view(self.n_splits, -1)
        a_QSri = tensors["A"].view(*shares_QS.shape, self.rank, -1)
        b_oQSr = tensors["B"].view(-1, *shares_QS.shape, self.rank)
        a_rI = torch.einsum("qs,qsri->rqi", shares_QS, a_QSri).flatten(1)
        b_Or = torch.einsum("qs,oqsr->qor", shares_QS, b_oQSr).flatten(0, 1)
        return b_Or @ a_rI * scaling
