"""The mixture as two products of LoRA's own size, with a chosen exponent on the gates' backward.

Shape suffixes: T tokens, I in, O out, E experts, R total rank; r is one expert's rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..types import GateRescale, GateRescaleScope, Gates, Shared
from .gate_rescale import surrogate_gates


def rank_gated(
    x_TI: Tensor,
    a: Tensor,
    b: Tensor,
    gates: Gates,
    expert_of_rank_R: Tensor | None = None,
    shared: Shared = "none",
) -> Tensor:
    """The mixture's update s ((x A^T) * spread(g)) B^T, whatever the number of experts.

    The value is eq. 8 of arXiv 2502.15828. In the backward, A and B see g^p in place of g (p = 1,
    1/2 or 0 on selected experts), the gates always receive their ordinary gradient <B^T dy, A x>
    per expert, and x receives the true gradient (scope "weights", eq. 13) or the surrogate (scope
    "output", Algorithm 1).

    Args:
        x_TI: inputs, dropout already applied (T, I).
        a: the experts' A stacked along the rank (R, I); one A (r, I) with shared "a".
        b: the experts' B stacked along the rank (O, R); one B (O, r) with shared "b".
        gates: the weights (T, E), zero for experts that were not selected, in any floating dtype,
            fp32 or wider advised; the scale s, which as in PEFT's LoRA multiplies the (T, O)
            product, so that one expert with gate 1 is LoRA bit for bit; the exponent, where an
            expert whose gate underflowed to 0 counts as not selected; and its scope.
        expert_of_rank_R: the expert that owns each rank (R,), needed only where the experts' ranks
            differ, which they cannot where a factor is shared.
        shared: which factor the experts share.

    Returns:
        (T, O) in the common dtype of x, A and B. Under autocast that is the autocast dtype.
    """
    device_type = x_TI.device.type
    if torch.is_autocast_enabled(device_type):
        # Autocast stops at a custom Function's border, so what `linear` would do happens here,
        # differentiably.
        dtype = torch.get_autocast_dtype(device_type)
        x_TI, a, b = x_TI.to(dtype), a.to(dtype), b.to(dtype)
    out: Tensor = _RankGated.apply(  # type: ignore[no-untyped-call]
        x_TI,
        a,
        b,
        gates.weights,
        gates.scaling,
        gates.rescale,
        gates.scope,
        expert_of_rank_R,
        shared,
    )
    return out


_ADJOINT: dict[Shared, Shared] = {"none": "none", "a": "b", "b": "a"}


class _RankGated(torch.autograd.Function):
    """Saves x, z = x A^T and the gates; the gated z is cheap enough to compute again.

    Z has R columns, or r where A is shared; h, the gated z, has R columns, or r where B is shared.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        a: Tensor,
        b: Tensor,
        weights_TE: Tensor,
        scaling: float,
        gate_rescale: GateRescale,
        gate_rescale_scope: GateRescaleScope,
        expert_of_rank_R: Tensor | None,
        shared: Shared,
    ) -> Tensor:
        z = torch.nn.functional.linear(x_TI, a)
        ctx.save_for_backward(x_TI, a, b, weights_TE, z, expert_of_rank_R)
        ctx.scaling = scaling
        ctx.gate_rescale = gate_rescale
        ctx.gate_rescale_scope = gate_rescale_scope
        ctx.shared = shared
        h = _gate_ranks(z, weights_TE, expert_of_rank_R, shared)
        return torch.nn.functional.linear(h, b) * scaling

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, a, b, weights_TE, z, owners_R = ctx.saved_tensors
        needs_x, needs_a, needs_b, needs_gates = ctx.needs_input_grad[:4]
        shared = ctx.shared
        # The gating's adjoint sums where the gating spreads, and the other way round.
        adjoint = _ADJOINT[shared]
        surrogate_TE = surrogate_gates(weights_TE, ctx.gate_rescale)

        scaled_TO = grad_TO * ctx.scaling
        grad_h = scaled_TO @ b  # gradient of the gated z, before any gate
        grad_x = grad_a = grad_b = grad_gates = None
        if needs_a or (needs_x and ctx.gate_rescale_scope == "output"):
            surrogate_grad_z = _gate_ranks(grad_h, surrogate_TE, owners_R, adjoint)
        if needs_a:
            grad_a = surrogate_grad_z.T @ x_TI
        if needs_b:
            grad_b = scaled_TO.T @ _gate_ranks(z, surrogate_TE, owners_R, shared)
        if needs_x:
            if ctx.gate_rescale_scope == "output":
                grad_x = surrogate_grad_z @ a
            else:
                grad_x = _gate_ranks(grad_h, weights_TE, owners_R, adjoint) @ a
        if needs_gates:
            grad_gates = _sum_ranks(grad_h, z, weights_TE, owners_R, shared)
        return grad_x, grad_a, grad_b, grad_gates, None, None, None, None, None


def _gate_ranks(
    z: Tensor, weights_TE: Tensor, expert_of_rank_R: Tensor | None, shared: Shared
) -> Tensor:
    """Gated z: z * spread(g) (T, R); g_i z for each expert if A is shared; their sum if B is."""
    gates = weights_TE.to(z.dtype)
    if shared == "a":
        return (z.unsqueeze(-2) * gates.unsqueeze(-1)).flatten(-2)
    if expert_of_rank_R is not None:
        return z * gates.index_select(-1, expert_of_rank_R)
    # A view of z as (T, E, r) lets broadcasting do the spreading: no (T, R) copy of the gates.
    gated_TEr = z.view(*gates.shape, z.shape[-1] // gates.shape[-1]) * gates.unsqueeze(-1)
    return gated_TEr.sum(-2) if shared == "b" else gated_TEr.flatten(-2)


def _sum_ranks(
    grad_h: Tensor,
    z: Tensor,
    weights_TE: Tensor,
    expert_of_rank_R: Tensor | None,
    shared: Shared,
) -> Tensor:
    """Gradient of the gates: grad_h * z summed over each expert's ranks, in the gates' dtype."""
    wide_h, wide_z = grad_h.to(weights_TE.dtype), z.to(weights_TE.dtype)
    experts = weights_TE.shape[-1]
    if shared == "a":
        return (wide_h.view(*weights_TE.shape, z.shape[-1]) * wide_z.unsqueeze(-2)).sum(-1)
    if shared == "b":
        return (wide_z.view(*weights_TE.shape, wide_h.shape[-1]) * wide_h.unsqueeze(-2)).sum(-1)
    product_TR = wide_h * wide_z
    if expert_of_rank_R is not None:
        return torch.zeros_like(weights_TE).index_add(-1, expert_of_rank_R, product_TR)
    return product_TR.view(*weights_TE.shape, product_TR.shape[-1] // experts).sum(-1)
