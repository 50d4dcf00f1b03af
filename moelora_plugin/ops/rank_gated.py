"""The mixture as two products of LoRA's own size, with a chosen exponent on the gates' backward.

It comes in two steps, since the gates stand between them: `project`, which also has room for the
router's own product with x, and `mix`. `rank_gated` is both, for gates that are there already.

Shape suffixes: T tokens, I in, O out, E experts, R total rank; r is one expert's rank. P counts the
columns of z: R, or r where A is shared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ..types import GateRescale, GateRescaleScope, Gates, Projection, Shared
from .gate_rescale import surrogate_gates


def rank_gated(
    x_TI: Tensor,
    a: Tensor,
    b: Tensor,
    gates: Gates,
    expert_of_rank_R: Tensor | None = None,
    shared: Shared = "none",
) -> Tensor:
    """The mixture's update s ((x A^T) * spread(g)) B^T (T, O); see `project` and `mix`."""
    return mix(project(x_TI, a), b, gates, expert_of_rank_R, shared)


def project(x_TI: Tensor, a: Tensor, gate_EI: Tensor | None = None) -> Projection:
    """z = x A^T, and a linear gate's logits x G^T with it.

    With a gate, A and G are multiplied as one matrix, in the backward too: x is read once for both,
    and its gradient is written once. That costs a copy of A and G and saves reading x, so it pays
    where there are more tokens than rows of A and G; with fewer the products are apart.

    Args:
        x_TI: inputs, dropout already applied (T, I).
        a: the experts' A, stacked along the rank (R, I), or one A (r, I) that they share.
        gate_EI: the gate's weight.

    Returns:
        z and the logits, in the common dtype of x and A. Under autocast that is the autocast dtype.
    """
    device_type = x_TI.device.type
    if torch.is_autocast_enabled(device_type):
        # Autocast stops at a custom Function's border, so what `linear` would do happens here,
        # differentiably.
        dtype = torch.get_autocast_dtype(device_type)
        x_TI, a = x_TI.to(dtype), a.to(dtype)
        gate_EI = None if gate_EI is None else gate_EI.to(dtype)
    if not torch.is_grad_enabled():
        return Projection(*_project(x_TI, a, gate_EI))
    z_TP, z_of_x_TP, logits_TE = _Project.apply(  # type: ignore[no-untyped-call]
        x_TI, a, gate_EI
    )
    return Projection(z_TP, logits_TE, z_of_x_TP)


def mix(
    projection: Projection,
    b: Tensor,
    gates: Gates,
    expert_of_rank_R: Tensor | None = None,
    shared: Shared = "none",
    onto_TO: Tensor | None = None,
) -> Tensor:
    """s (z * spread(g)) B^T, whatever the number of experts.

    The value is eq. 8 of arXiv 2502.15828. In the backward, A and B see g^p in place of g (p = 1,
    1/2 or 0 on selected experts), the gates always receive their ordinary gradient <B^T dy, A x>
    per expert, and x receives the true gradient (scope "weights", eq. 13) or the surrogate (scope
    "output", Algorithm 1).

    The scale s is multiplied into the gates, which are the smallest of all factors; but for a
    single expert, where it multiplies the (T, O) product as in PEFT's LoRA: with gate 1 that is
    LoRA bit for bit.

    Args:
        projection: z (T, P), of `project`.
        b: the experts' B stacked along the rank (O, R); one B (O, r) with shared "b".
        gates: the weights (T, E), zero for experts that were not selected, in any floating dtype,
            fp32 or wider advised; s; the exponent, where an expert whose gate underflowed to 0
            counts as not selected; and its scope.
        expert_of_rank_R: the expert that owns each rank (R,), needed only where the experts' ranks
            differ, which they cannot where a factor is shared.
        shared: which factor the experts share.
        onto_TO: what the update is added to: the base's output. It is not changed itself.

    Returns:
        (T, O) in the common dtype of z and B; with `onto_TO`, in the wider one of that and its own.
    """
    z_TP = projection.z
    if torch.is_autocast_enabled(z_TP.device.type):
        b = b.to(torch.get_autocast_dtype(z_TP.device.type))
    if not torch.is_grad_enabled():
        return _mix(z_TP, b, gates.weights, gates.scaling, expert_of_rank_R, shared, onto_TO)
    out: Tensor = _Mix.apply(  # type: ignore[no-untyped-call]
        z_TP,
        projection.z_of_input,
        b,
        gates.weights,
        onto_TO,
        gates.scaling,
        gates.rescale,
        gates.scope,
        expert_of_rank_R,
        shared,
    )
    return out


def _project(x_TI: Tensor, a: Tensor, gate_EI: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if gate_EI is None:
        return linear(x_TI, a), None
    if len(x_TI) < len(a) + len(gate_EI):
        return linear(x_TI, a), linear(x_TI, gate_EI)
    both = linear(x_TI, torch.cat([a, gate_EI]))
    return both[:, : len(a)], both[:, len(a) :]


class _Project(torch.autograd.Function):
    """Saves x, A and G.

    Its second result has the shape of z and no values or storage. It is there for its gradient: x
    receives that one, and A the gradient of z.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, a: Tensor, gate_EI: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_TI, a, gate_EI)
        z_TP, logits_TE = _project(x_TI, a, gate_EI)
        z_of_x_TP = z_TP.new_empty(()).expand_as(z_TP) if ctx.needs_input_grad[0] else None
        return z_TP, z_of_x_TP, logits_TE

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_z: Tensor | None,
        grad_z_of_x: Tensor | None,
        grad_logits: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        x_TI, a, gate_EI = ctx.saved_tensors
        needs_x, needs_a, needs_gate = ctx.needs_input_grad
        grad_x = grad_a = grad_gate = None
        if needs_a and needs_gate and grad_z is not None and grad_logits is not None:
            grad_both = torch.cat([grad_z, grad_logits], -1).T @ x_TI
            grad_a, grad_gate = grad_both[: len(a)], grad_both[len(a) :]
        else:
            if needs_a and grad_z is not None:
                grad_a = grad_z.T @ x_TI
            if needs_gate and grad_logits is not None:
                grad_gate = grad_logits.T @ x_TI
        if needs_x:
            if grad_z_of_x is not None and grad_logits is not None:
                both = torch.cat([grad_z_of_x, grad_logits], -1)
                grad_x = both @ torch.cat([a, gate_EI])
            elif grad_z_of_x is not None:
                grad_x = grad_z_of_x @ a
            elif grad_logits is not None:
                grad_x = grad_logits @ gate_EI
        return grad_x, grad_a, grad_gate


def _scales(scaling: float, weights_TE: Tensor) -> tuple[float, float]:
    """What the gates and what the (T, O) product are multiplied with; see `mix`."""
    return (1.0, scaling) if weights_TE.shape[-1] == 1 else (scaling, 1.0)


def _mix(
    z_TP: Tensor,
    b: Tensor,
    weights_TE: Tensor,
    scaling: float,
    expert_of_rank_R: Tensor | None,
    shared: Shared,
    onto_TO: Tensor | None,
) -> Tensor:
    inner, outer = _scales(scaling, weights_TE)
    h = _gate_ranks(z_TP, weights_TE * inner, expert_of_rank_R, shared)
    update_TO = linear(h, b)
    if outer != 1.0:
        update_TO = update_TO * outer
    if onto_TO is None:
        return update_TO
    if torch.promote_types(update_TO.dtype, onto_TO.dtype) != update_TO.dtype:
        return onto_TO + update_TO
    return update_TO.add_(onto_TO)


_ADJOINT: dict[Shared, Shared] = {"none": "none", "a": "b", "b": "a"}


class _Mix(torch.autograd.Function):
    """Saves z and the gates; the gated z is cheap enough to compute again.

    Z has R columns, or r where A is shared; h, the gated z, has R columns, or r where B is shared.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z_TP: Tensor,
        z_of_x_TP: Tensor | None,
        b: Tensor,
        weights_TE: Tensor,
        onto_TO: Tensor | None,
        scaling: float,
        gate_rescale: GateRescale,
        gate_rescale_scope: GateRescaleScope,
        expert_of_rank_R: Tensor | None,
        shared: Shared,
    ) -> Tensor:
        ctx.save_for_backward(z_TP, b, weights_TE, expert_of_rank_R)
        ctx.scaling = scaling
        ctx.gate_rescale = gate_rescale
        ctx.gate_rescale_scope = gate_rescale_scope
        ctx.shared = shared
        ctx.onto_dtype = None if onto_TO is None else onto_TO.dtype
        return _mix(z_TP, b, weights_TE, scaling, expert_of_rank_R, shared, onto_TO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        z_TP, b, weights_TE, owners_R = ctx.saved_tensors
        needs_z, needs_z_of_x, needs_b, needs_gates, needs_onto = ctx.needs_input_grad[:5]
        shared, rescale = ctx.shared, ctx.gate_rescale
        # The gating's adjoint sums where the gating spreads, and the other way round.
        adjoint = _ADJOINT[shared]
        inner, outer = _scales(ctx.scaling, weights_TE)
        grad_onto = grad_TO.to(ctx.onto_dtype) if needs_onto else None

        grad_TO = grad_TO.to(b.dtype)
        if outer != 1.0:
            grad_TO = grad_TO * outer
        grad_h = grad_TO @ b  # gradient of the gated z, before any gate
        grad_z = grad_z_of_x = grad_b = grad_gates = None
        surrogate_TE = surrogate_gates(weights_TE, rescale) * inner
        if needs_z:
            grad_z = _gate_ranks(grad_h, surrogate_TE, owners_R, adjoint)
        if needs_z_of_x:
            if rescale == "none" or ctx.gate_rescale_scope == "output":
                grad_z_of_x = grad_z
            else:
                grad_z_of_x = _gate_ranks(grad_h, weights_TE * inner, owners_R, adjoint)
        if needs_b:
            grad_b = grad_TO.T @ _gate_ranks(z_TP, surrogate_TE, owners_R, shared)
        if needs_gates:
            grad_gates = _sum_ranks(grad_h, z_TP, weights_TE, owners_R, shared) * inner
        rest = (None,) * 5
        return grad_z, grad_z_of_x, grad_b, grad_gates, grad_onto, *rest


def _gate_ranks(
    z_TP: Tensor, weights_TE: Tensor, expert_of_rank_R: Tensor | None, shared: Shared
) -> Tensor:
    """Gated z: z * spread(g) (T, R); g_i z for each expert if A is shared; their sum if B is."""
    gates = weights_TE.to(z_TP.dtype)
    if shared == "a":
        return (z_TP.unsqueeze(-2) * gates.unsqueeze(-1)).flatten(-2)
    if expert_of_rank_R is not None:
        return z_TP * gates.index_select(-1, expert_of_rank_R)
    # A view of z as (T, E, r) lets broadcasting do the spreading: no (T, R) copy of the gates.
    gated_TEr = z_TP.view(*gates.shape, z_TP.shape[-1] // gates.shape[-1]) * gates.unsqueeze(-1)
    return gated_TEr.sum(-2) if shared == "b" else gated_TEr.flatten(-2)


def _sum_ranks(
    grad_h: Tensor,
    z_TP: Tensor,
    weights_TE: Tensor,
    expert_of_rank_R: Tensor | None,
    shared: Shared,
) -> Tensor:
    """Gradient of the gates: grad_h * z summed over each expert's ranks, in the gates' dtype."""
    wide_h, wide_z = grad_h.to(weights_TE.dtype), z_TP.to(weights_TE.dtype)
    experts = weights_TE.shape[-1]
    if shared == "a":
        return (wide_h.view(*weights_TE.shape, z_TP.shape[-1]) * wide_z.unsqueeze(-2)).sum(-1)
    if shared == "b":
        return (wide_z.view(*weights_TE.shape, wide_h.shape[-1]) * wide_h.unsqueeze(-2)).sum(-1)
    product_TR = wide_h * wide_z
    if expert_of_rank_R is not None:
        return torch.zeros_like(weights_TE).index_add(-1, expert_of_rank_R, product_TR)
    return product_TR.view(*weights_TE.shape, product_TR.shape[-1] // experts).sum(-1)
