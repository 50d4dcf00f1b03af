"""The mixture at a cost that follows the selected experts, where `rank_gated` pays for all of them.

Shape suffixes: T tokens, I in, O out, E experts, R total rank, P pairs (a token, an expert selected
for it) in the order of the experts, H either of I and O; r is one expert's rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..types import GateRescale, GateRescaleScope, Gates
from .gate_rescale import surrogate_gates

# Fitted to `benchmarks/crossover.py --threads 1` on a 2.6 GHz core with AVX-512, in fp32.
_MOVE = 64  # to gather a row, or to add one, takes as long as products with so many ranks
_READ = 8  # to bring a factor into the cache takes as long as its products with so many tokens
_CALL = 2**20  # multiply-adds in the time of the calls for one expert


def prefers_grouped(
    tokens: int, experts: int, selected: float, rank: int, width: int, device_type: str
) -> bool:
    """Whether `grouped_experts` is faster than `rank_gated`.

    Compares the time of both in multiply-adds, by a model that was fitted to measurements:

        dense     (T + 8) R width / threads
        grouped   P (r + 64) width + min(E, P) (2^20 + 8 r width) + 3 * 2^20

    With many tokens and one thread that is R > k (r + 64) or so: moving a row costs more than its
    products with an expert of usual rank. The model errs on the dense side. More threads make large
    products faster and the small ones of an expert hardly (two by a fifth); beyond two that is an
    assumption.

    Always False on anything but a CPU, for want of a measurement: `grouped_experts` would launch a
    dozen small kernels per expert, and dense products are what a GPU is good at. And always False
    while `torch.compile` traces, whose graph the grouped path would break.

    Args:
        tokens: T.
        experts: E.
        selected: experts of a token, on average.
        rank: r, of one expert.
        width: mean of I and O.
        device_type: where it runs.
    """
    if device_type != "cpu" or torch.compiler.is_compiling():
        return False
    pairs = tokens * selected
    used = min(experts, pairs)
    dense = (tokens + _READ) * experts * rank * width / torch.get_num_threads()
    return (
        pairs * (rank + _MOVE) * width + used * (_CALL + _READ * rank * width) + 3 * _CALL < dense
    )


def grouped_experts(
    x_TI: Tensor, a_RI: Tensor, b_OR: Tensor, gates: Gates, onto_TO: Tensor | None = None
) -> Tensor:
    """The update s sum_i g_i B_i A_i x, for experts of one rank (arXiv 2502.15828, eq. 8).

    Value and gradients are those of `rank_gated` but for one: a gate that is 0 gets no gradient,
    since its expert is not evaluated. So it is for gates that are 0 by a mask, through which
    nothing passes, and not for one whose 0 is the value of a function that has a slope there (a
    straight-through estimate).

    The cost is that of P = sum of selected experts over tokens: 12 P r (I + O) operations forward
    and backward, where `rank_gated` has 12 T R (I + O). An expert that no token selects costs
    nothing forward, and a gradient of zeros. Kept for the backward are x, the gates and A x of the
    pairs (P, r). On a GPU, where the rows of one expert after the other are too little work, it is
    right but slow, and waits for the device to count the pairs.

    Args:
        x_TI: inputs, dropout already applied (T, I).
        a_RI: the experts' A stacked along the rank.
        b_OR: the experts' B stacked along the rank.
        gates: the weights (T, E), zero for experts that were not selected, in any floating dtype,
            fp32 or wider advised; the scale s, the exponent of the gates in the backward and its
            scope, as `rank_gated` has them.
        onto_TO: what the update is added to: the base's output. It is not changed itself.

    Returns:
        (T, O) in the common dtype of x, A and B, under autocast in the autocast dtype; with
        `onto_TO`, in the wider one of that and its own. The sum over a token's experts is taken in
        fp32 or wider.
    """
    device_type = x_TI.device.type
    if torch.is_autocast_enabled(device_type):
        # Autocast stops at a custom Function's border, so what `linear` would do happens here,
        # differentiably.
        dtype = torch.get_autocast_dtype(device_type)
        x_TI, a_RI, b_OR = x_TI.to(dtype), a_RI.to(dtype), b_OR.to(dtype)
    out: Tensor = _GroupedExperts.apply(  # type: ignore[no-untyped-call]
        x_TI, a_RI, b_OR, gates.weights, onto_TO, gates.scaling, gates.rescale, gates.scope
    )
    return out


class _Pairs(NamedTuple):
    """The selected experts, those of the first expert first."""

    expert_P: Tensor
    token_P: Tensor
    counts: list[int]  # of each expert

    @classmethod
    def of(cls, weights_TE: Tensor) -> _Pairs:
        """Those whose gate is not 0; a gate that is NaN is among them, so that it shows."""
        expert_P, token_P = weights_TE.T.nonzero().T.contiguous()
        counts_E = torch.bincount(expert_P, minlength=weights_TE.shape[-1])
        return cls(expert_P, token_P, counts_E.tolist())

    def slices(self) -> Iterator[tuple[int, slice]]:
        """Each expert that has pairs, and where they are."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(start, start + count)
            start += count

    def rows(self, source_TH: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
        """The same, and the rows of `source_TH` that belong to them.

        They are gathered when their turn comes and into one buffer, so they are still in the cache
        when they are multiplied: all of them at once would cost several times the products.
        """
        buffer_H = self.buffer(source_TH)
        for expert, where in self.slices():
            token = self.token_P[where]
            yield expert, where, torch.index_select(source_TH, 0, token, out=buffer_H[: len(token)])

    def buffer(self, like_TH: Tensor) -> Tensor:
        """Room for the rows of any one expert."""
        return like_TH.new_empty(max(self.counts), like_TH.shape[-1])

    def gradient(self, factor: Tensor) -> Tensor:
        """What the gradient of a stacked factor is written to, zero where nothing will be."""
        return torch.zeros_like(factor) if 0 in self.counts else torch.empty_like(factor)


class _GroupedExperts(torch.autograd.Function):
    """Saves x, A x of the pairs and the gates; the rows of x are gathered anew in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        a_RI: Tensor,
        b_OR: Tensor,
        weights_TE: Tensor,
        onto_TO: Tensor | None,
        scaling: float,
        rescale: GateRescale,
        scope: GateRescaleScope,
    ) -> Tensor:
        pairs = _Pairs.of(weights_TE)
        rank = len(a_RI) // weights_TE.shape[-1]
        z_Pr = x_TI.new_empty(len(pairs.token_P), rank)
        experts_a = a_RI.split(rank)
        for expert, where, x_rows in pairs.rows(x_TI):
            torch.mm(x_rows, experts_a[expert].T, out=z_Pr[where])
        gates_P = weights_TE[pairs.token_P, pairs.expert_P]
        ctx.save_for_backward(
            x_TI, a_RI, b_OR, weights_TE, gates_P, z_Pr, pairs.expert_P, pairs.token_P
        )
        ctx.counts = pairs.counts
        ctx.scaling = scaling
        ctx.rescale = rescale
        ctx.scope = scope
        ctx.onto_dtype = None if onto_TO is None else onto_TO.dtype
        shape = (len(x_TI), len(b_OR))
        h_Pr = _gated(z_Pr, gates_P * scaling)
        return _scattered(pairs, h_Pr, b_OR.T, shape, onto_TO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, a_RI, b_OR, weights_TE, gates_P, z_Pr, expert_P, token_P = ctx.saved_tensors
        needs_x, needs_a, needs_b, needs_gates, needs_onto = ctx.needs_input_grad[:5]
        pairs = _Pairs(expert_P, token_P, ctx.counts)
        rank = z_Pr.shape[-1]
        surrogate_P = surrogate_gates(gates_P, ctx.rescale) * ctx.scaling
        grad_onto = grad_TO.to(ctx.onto_dtype) if needs_onto else None
        grad_x = grad_a = grad_b = grad_gates = None

        grad_h_Pr = torch.empty_like(z_Pr)  # gradient of the gated z, before any gate
        experts_b = b_OR.split(rank, 1)
        if needs_b:
            grad_b = pairs.gradient(b_OR)
            experts_grad_b = grad_b.split(rank, 1)
            surrogate_h_Pr = _gated(z_Pr, surrogate_P)
        for expert, where, grad_rows in pairs.rows(grad_TO.to(b_OR.dtype)):
            torch.mm(grad_rows, experts_b[expert], out=grad_h_Pr[where])
            if needs_b:
                torch.mm(grad_rows.T, surrogate_h_Pr[where], out=experts_grad_b[expert])

        surrogate_grad_z_Pr = _gated(grad_h_Pr, surrogate_P)
        if needs_a:
            grad_a = pairs.gradient(a_RI)
            experts_grad_a = grad_a.split(rank)
            for expert, where, x_rows in pairs.rows(x_TI):
                torch.mm(surrogate_grad_z_Pr[where].T, x_rows, out=experts_grad_a[expert])
        if needs_x:
            grad_z_Pr = surrogate_grad_z_Pr
            if ctx.scope == "weights" and ctx.rescale != "none":
                grad_z_Pr = _gated(grad_h_Pr, gates_P * ctx.scaling)
            grad_x = _scattered(pairs, grad_z_Pr, a_RI, x_TI.shape)
        if needs_gates:
            product_Pr = grad_h_Pr.to(gates_P.dtype) * z_Pr.to(gates_P.dtype)
            grad_gates = torch.zeros_like(weights_TE)
            grad_gates[token_P, expert_P] = product_Pr.sum(-1) * ctx.scaling
        return grad_x, grad_a, grad_b, grad_gates, grad_onto, None, None, None


def _gated(z_Pr: Tensor, gates_P: Tensor) -> Tensor:
    return z_Pr * gates_P.to(z_Pr.dtype).unsqueeze(-1)


def _scattered(
    pairs: _Pairs,
    h_Pr: Tensor,
    factor_RH: Tensor,
    shape: tuple[int, int],
    onto_TH: Tensor | None = None,
) -> Tensor:
    """Each pair's h times its expert's block of the factor, summed over the pairs of a token."""
    dtype = h_Pr.dtype if onto_TH is None else torch.promote_types(h_Pr.dtype, onto_TH.dtype)
    # A sum in half precision would be rounded once for each expert.
    wide = torch.promote_types(dtype, torch.float32)
    start_TH = h_Pr.new_zeros(()).expand(shape) if onto_TH is None else onto_TH
    out_TH = start_TH.to(wide, copy=True)
    experts = factor_RH.split(h_Pr.shape[-1])
    buffer_H = pairs.buffer(factor_RH)
    for expert, where in pairs.slices():
        token = pairs.token_P[where]
        rows = torch.mm(h_Pr[where], experts[expert], out=buffer_H[: len(token)])
        out_TH.index_add_(0, token, rows.to(wide))
    return out_TH.to(dtype)
