"""The mixture as two products of LoRA's own size, with a chosen exponent on the gates' backward.

Shape suffixes: T tokens, I in, O out, E experts, R total rank; r is one expert's rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..types import GateRescale, GateRescaleScope


def rank_gated(
    x_TI: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    weights_TE: Tensor,
    scaling: float,
    gate_rescale: GateRescale = "none",
    gate_rescale_scope: GateRescaleScope = "weights",
    expert_of_rank_R: Tensor | None = None,
) -> Tensor:
    """The mixture's update s ((x A^T) * spread(g)) B^T, whatever the number of experts.

    The value is eq. 8 of arXiv 2502.15828. In the backward, A and B see g^p in place of g (p = 1,
    1/2 or 0 on selected experts), the gates always receive their ordinary gradient <B^T dy, A x>
    per expert, and x receives the true gradient (scope "weights", eq. 13) or the surrogate (scope
    "output", Algorithm 1).

    Args:
        x_TI: inputs, dropout already applied (T, I).
        a_RI: the experts' A stacked along the rank (R, I).
        b_OR: the experts' B stacked along the rank (O, R).
        weights_TE: gates (T, E), zero for experts that were not selected; any floating dtype, fp32
            or wider advised.
        scaling: LoRA scale s. As in PEFT's LoRA it multiplies the (T, O) product, so that one
            expert with gate 1 is LoRA bit for bit.
        gate_rescale: "none", "sqrt" or "exact". An expert whose gate underflowed to 0 counts as not
            selected.
        gate_rescale_scope: "weights" or "output".
        expert_of_rank_R: the expert that owns each rank (R,), needed only where the experts' ranks
            differ.

    Returns:
        (T, O) in the common dtype of x, A and B. Under autocast that is the autocast dtype.
    """
    device_type = x_TI.device.type
    if torch.is_autocast_enabled(device_type):
        # Autocast stops at a custom Function's border, so what `linear` would do happens here,
        # differentiably.
        dtype = torch.get_autocast_dtype(device_type)
        x_TI, a_RI, b_OR = x_TI.to(dtype), a_RI.to(dtype), b_OR.to(dtype)
    out: Tensor = _RankGated.apply(  # type: ignore[no-untyped-call]
        x_TI, a_RI, b_OR, weights_TE, scaling, gate_rescale, gate_rescale_scope, expert_of_rank_R
    )
    return out


class _RankGated(torch.autograd.Function):
    """Saves x, z = x A^T and the gates; the gated z is cheap enough to compute again."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        a_RI: Tensor,
        b_OR: Tensor,
        weights_TE: Tensor,
        scaling: float,
        gate_rescale: GateRescale,
        gate_rescale_scope: GateRescaleScope,
        expert_of_rank_R: Tensor | None,
    ) -> Tensor:
        z_TR = torch.nn.functional.linear(x_TI, a_RI)
        ctx.save_for_backward(x_TI, a_RI, b_OR, weights_TE, z_TR, expert_of_rank_R)
        ctx.scaling = scaling
        ctx.gate_rescale = gate_rescale
        ctx.gate_rescale_scope = gate_rescale_scope
        h_TR = _gate_ranks(z_TR, weights_TE, expert_of_rank_R)
        return torch.nn.functional.linear(h_TR, b_OR) * scaling

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, a_RI, b_OR, weights_TE, z_TR, expert_of_rank_R = ctx.saved_tensors
        needs_x, needs_a, needs_b, needs_gates = ctx.needs_input_grad[:4]
        surrogate_TE = _surrogate_gates(weights_TE, ctx.gate_rescale)

        scaled_TO = grad_TO * ctx.scaling
        grad_h_TR = scaled_TO @ b_OR  # gradient of the gated z, before any gate
        grad_x = grad_a = grad_b = grad_gates = None
        if needs_a or (needs_x and ctx.gate_rescale_scope == "output"):
            surrogate_grad_z_TR = _gate_ranks(grad_h_TR, surrogate_TE, expert_of_rank_R)
        if needs_a:
            grad_a = surrogate_grad_z_TR.T @ x_TI
        if needs_b:
            grad_b = scaled_TO.T @ _gate_ranks(z_TR, surrogate_TE, expert_of_rank_R)
        if needs_x:
            if ctx.gate_rescale_scope == "output":
                grad_x = surrogate_grad_z_TR @ a_RI
            else:
                grad_x = _gate_ranks(grad_h_TR, weights_TE, expert_of_rank_R) @ a_RI
        if needs_gates:
            grad_gates = _sum_ranks(grad_h_TR, z_TR, weights_TE, expert_of_rank_R)
        return grad_x, grad_a, grad_b, grad_gates, None, None, None, None


def _gate_ranks(z_TR: Tensor, weights_TE: Tensor, expert_of_rank_R: Tensor | None) -> Tensor:
    """Gated z, that is z * spread(g): expert i's gate multiplies expert i's ranks."""
    gates = weights_TE.to(z_TR.dtype)
    if expert_of_rank_R is not None:
        return z_TR * gates.index_select(-1, expert_of_rank_R)
    # A view of z as (T, E, r) lets broadcasting do the spreading: no (T, R) copy of the gates.
    z_TEr = z_TR.view(*gates.shape, z_TR.shape[-1] // gates.shape[-1])
    return (z_TEr * gates.unsqueeze(-1)).flatten(-2)


def _surrogate_gates(weights_TE: Tensor, gate_rescale: GateRescale) -> Tensor:
    """g^p, with 0^0 read as 0: an expert that was not selected learns nothing from the token."""
    if gate_rescale == "none":
        return weights_TE
    if gate_rescale == "sqrt":
        return weights_TE.sqrt()
    return (weights_TE != 0).to(weights_TE.dtype)


def _sum_ranks(
    grad_h_TR: Tensor, z_TR: Tensor, weights_TE: Tensor, expert_of_rank_R: Tensor | None
) -> Tensor:
    """Gradient of the gates: grad_h * z summed over each expert's ranks, in the gates' dtype."""
    product_TR = grad_h_TR.to(weights_TE.dtype) * z_TR.to(weights_TE.dtype)
    if expert_of_rank_R is not None:
        return torch.zeros_like(weights_TE).index_add(-1, expert_of_rank_R, product_TR)
    rank = product_TR.shape[-1] // weights_TE.shape[-1]
    return product_TR.view(*weights_TE.shape, rank).sum(-1)
