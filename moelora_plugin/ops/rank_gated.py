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


def project(
    x_TI: Tensor, a: Tensor, gate_EI: Tensor | None = None, dropout: float = 0.0
) -> Projection:
    """The product z = dropout(x) A^T, and a linear gate's logits x G^T with it.

    With a gate, A and G are multiplied as one matrix, in the backward too: x is read once for both,
    and its gradient is written once. That costs a copy of A and G and saves reading x, so it pays
    where there are more tokens than rows of A and G; with fewer the products are apart, and so they
    are under dropout, which the gate does not see.

    What is kept for the backward is x as it came, which other layers keep as well, and dropout's
    mask; not its copy in A's dtype, nor the dropped one.

    Args:
        x_TI: inputs (T, I).
        a: the experts' A, stacked along the rank (R, I), or one A (r, I) that they share.
        gate_EI: the gate's weight, in A's dtype.
        dropout: probability that an entry of x is dropped on its way to the experts.

    Returns:
        z and the logits, in A's dtype. Under autocast that is the autocast dtype.
    """
    device_type = x_TI.device.type
    if torch.is_autocast_enabled(device_type):
        # Autocast stops at a custom Function's border, so what `linear` would do happens here,
        # differentiably.
        dtype = torch.get_autocast_dtype(device_type)
        a, gate_EI = a.to(dtype), None if gate_EI is None else gate_EI.to(dtype)
    if not torch.is_grad_enabled():
        x_TI = x_TI.to(a.dtype)
        dropped_TI = torch.dropout(x_TI, dropout, True) if dropout else x_TI
        return Projection(*_products(dropped_TI, x_TI, a, gate_EI))
    z_TP, z_of_x_TP, logits_TE = _Project.apply(  # type: ignore[no-untyped-call]
        x_TI, a, gate_EI, dropout
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
    """The update s (z * spread(g)) B^T, whatever the number of experts.

    The value is eq. 8 of arXiv 2502.15828. In the backward, A and B see g^p in place of g (p = 1,
    1/2 or 0 on selected experts), the gates always receive their ordinary gradient <B^T dy, A x>
    per expert, and x receives the true gradient (scope "weights", eq. 13) or the surrogate (scope
    "output", Algorithm 1).

    The last product is added to the base's output and scaled in the same pass, and in the backward
    the scale goes into the gates, the smallest of all factors. Not so for a single expert, where s
    multiplies (T, O) tensors in PEFT's order: with gate 1 that is LoRA bit for bit.

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


def _products(
    dropped_TI: Tensor, x_TI: Tensor, a: Tensor, gate_EI: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if gate_EI is None:
        return linear(dropped_TI, a), None
    if dropped_TI is not x_TI or x_TI.shape[0] < a.shape[0] + gate_EI.shape[0]:
        return linear(dropped_TI, a), linear(x_TI, gate_EI)
    both = linear(x_TI, torch.cat([a, gate_EI]))
    return both[:, : a.shape[0]], both[:, a.shape[0] :]


class _Project(torch.autograd.Function):
    """Saves x, A, G and the mask.

    Its second result has the shape of z and no values or storage. It is there for its gradient: x
    receives that one, and A the gradient of z.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, a: Tensor, gate_EI: Tensor | None, dropout: float
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        wide_TI, mask_TI = x_TI.to(a.dtype), None
        dropped_TI = wide_TI
        if dropout:
            dropped_TI, mask_TI = torch.native_dropout(wide_TI, dropout, True)
        ctx.save_for_backward(x_TI, a, gate_EI, mask_TI)
        ctx.kept_scale = 0.0 if dropout == 1.0 else 1.0 / (1.0 - dropout)
        z_TP, logits_TE = _products(dropped_TI, wide_TI, a, gate_EI)
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
        x_TI, a, gate_EI, mask_TI = ctx.saved_tensors
        needs_x, needs_a, needs_gate, _ = ctx.needs_input_grad
        wide_TI = x_TI.to(a.dtype)
        grad_x = grad_a = grad_gate = None

        if needs_a and needs_gate and (both := _joined(grad_z, grad_logits, mask_TI)) is not None:
            grad_a, grad_gate = (both.T @ wide_TI).tensor_split([len(a)])
        else:
            if needs_a and grad_z is not None:
                dropped_TI = wide_TI if mask_TI is None else wide_TI * mask_TI * ctx.kept_scale
                grad_a = grad_z.T @ dropped_TI
            if needs_gate and grad_logits is not None:
                grad_gate = grad_logits.T @ wide_TI

        if needs_x and (both := _joined(grad_z_of_x, grad_logits, mask_TI)) is not None:
            grad_x = both @ torch.cat([a, gate_EI])
        elif needs_x:
            if grad_z_of_x is not None:
                grad_x = grad_z_of_x @ a
                if mask_TI is not None:
                    grad_x = grad_x.mul_(mask_TI).mul_(ctx.kept_scale)
            if grad_logits is not None:
                of_gate = grad_logits @ gate_EI
                grad_x = of_gate if grad_x is None else grad_x.add_(of_gate)
        grad_x = None if grad_x is None else grad_x.to(x_TI.dtype)
        return grad_x, grad_a, grad_gate, None


def _joined(
    grad_z: Tensor | None, grad_logits: Tensor | None, mask_TI: Tensor | None
) -> Tensor | None:
    """The gradients of z and the logits side by side, where one product with x serves both."""
    if grad_z is None or grad_logits is None or mask_TI is not None:
        return None
    return torch.cat([grad_z, grad_logits], -1)


def _mix(
    z_TP: Tensor,
    b: Tensor,
    weights_TE: Tensor,
    scaling: float,
    expert_of_rank_R: Tensor | None,
    shared: Shared,
    onto_TO: Tensor | None,
) -> Tensor:
    h = _gate_ranks(z_TP, weights_TE, expert_of_rank_R, shared)
    if onto_TO is None:
        return linear(h, b) * scaling
    if weights_TE.shape[-1] == 1 or onto_TO.dtype != h.dtype:
        return onto_TO + linear(h, b) * scaling
    return torch.addmm(onto_TO, h, b.T, alpha=scaling)


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
        is_lora = weights_TE.shape[-1] == 1
        inner, outer = (1.0, ctx.scaling) if is_lora else (ctx.scaling, 1.0)
        grad_onto = grad_TO.to(ctx.onto_dtype) if needs_onto else None

        grad_TO = grad_TO.to(b.dtype)
        if is_lora:
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
