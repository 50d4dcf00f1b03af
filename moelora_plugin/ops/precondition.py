"""Riemannian preconditioning of (A, B) pairs, batched over experts and layers.

Per expert i (arXiv 2502.15828, eq. 6, with damping):

    grad_A_i <- (B_i^T B_i + damping I)^-1 grad_A_i
    grad_B_i <- grad_B_i (A_i A_i^T + damping I)^-1

Where the experts share A, its metric is sum_i B_i^T B_i, and every B_i has the one of A; where they
share B, the other way round.

The r x r metrics of all experts of all layers that share r are factorised together in one call.

Shape suffixes: I in, O out, E experts, R total rank; r is one expert's rank. N counts the experts
of all layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import Shared

# Each retry multiplies the damping of the metrics that failed. A finite Gram matrix plus a shift
# beyond its rounding error is positive definite, so a handful of retries always suffices.
_ESCALATION = 10.0


def split_experts(factor: Tensor, ranks: Sequence[int], dim: int) -> Tensor:
    """View a stacked factor as one matrix per expert, ranks first: (E, r, n).

    Args:
        factor: stacked A (R, I) with dim 0, or stacked B (O, R) with dim 1.
        ranks: rank of each expert; where they differ the result is padded with zero rows to the
            largest.
        dim: the rank dimension of `factor`.

    Returns:
        (E, max r, I) for A; (E, max r, O) for B, that is each B_i transposed. A view where all
        ranks are equal.
    """
    rows = factor if dim == 0 else factor.T
    if len(set(ranks)) == 1:
        experts: Tensor = rows.unflatten(0, (len(ranks), -1))
        return experts
    padded = rows.new_zeros(len(ranks), max(ranks), rows.shape[1])
    padded[_rank_mask(ranks, rows.device)] = rows
    return padded


def join_experts(experts: Tensor, ranks: Sequence[int], dim: int) -> Tensor:
    """Inverse of `split_experts`: from (E, r, n) back to the stacked factor, padding dropped."""
    rows = (
        experts.flatten(0, 1)
        if len(set(ranks)) == 1
        else experts[_rank_mask(ranks, experts.device)]
    )
    return rows if dim == 0 else rows.T


def _rank_mask(ranks: Sequence[int], device: torch.device) -> Tensor:
    """True at (expert, row) where that expert has such a row (E, max r)."""
    return torch.arange(max(ranks), device=device) < torch.tensor(ranks, device=device).unsqueeze(1)


def gram(experts: Tensor) -> Tensor:
    """Metrics of (E, r, n) factors: (E, r, r), in fp32 or wider.

    TF32 products would lose the small eigenvalues that the damping is there to keep, so the product
    runs in full precision whatever the global switch says.
    """
    wide = experts.to(torch.promote_types(experts.dtype, torch.float32))
    if wide.is_cuda and wide.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        wide = wide.double()
    return (wide @ wide.mT).to(torch.promote_types(experts.dtype, torch.float32))


def apply_inverse(inverse_Err: Tensor, grad: Tensor, ranks: Sequence[int], dim: int) -> Tensor:
    """Precondition the gradient of a stacked factor by its partner's inverse metrics.

    Args:
        inverse_Err: (E, max r, max r), fp32 or wider.
        grad: of stacked A (R, I) with dim 0, or of stacked B (O, R) with dim 1.
        ranks: rank of each expert.
        dim: the rank dimension of `grad`.

    Returns:
        As `grad` in shape and dtype, contiguous.
    """
    experts_Ern = split_experts(grad, ranks, dim).to(inverse_Err.dtype)
    return join_experts(inverse_Err @ experts_Ern, ranks, dim).to(grad.dtype).contiguous()


def metric_of(partner: Tensor, side: str, ranks: Sequence[int], shared: Shared) -> Tensor:
    """The metrics that measure the gradient of one factor, from its partner.

    Args:
        partner: stacked B (O, R) for side "a", stacked A (R, I) for side "b"; the one factor (O, r)
            or (r, I) where the experts share it.
        side: whose gradient is measured, "a" or "b".
        ranks: rank of each expert.
        shared: which factor the experts share.

    Returns:
        (E, r, r), in fp32 or wider; (1, r, r) where one metric serves all.
    """
    partner_dim = 1 if side == "a" else 0
    if shared == "none":
        return gram(split_experts(partner, ranks, partner_dim))
    if shared == side:
        return gram(split_experts(partner, ranks, partner_dim)).sum(0, keepdim=True)
    return gram(split_experts(partner, ranks[:1], partner_dim))


def precondition(
    inverse: Tensor, grad: Tensor, side: str, ranks: Sequence[int], shared: Shared
) -> Tensor:
    """The gradient of one factor, times the inverse of what `metric_of` gave.

    Returns:
        As `grad` in shape and dtype, contiguous.
    """
    return apply_inverse(
        inverse, grad, ranks[:1] if shared == side else ranks, 0 if side == "a" else 1
    )


def damped_inverses(metrics: Sequence[Tensor], damping: float) -> tuple[list[Tensor], int]:
    """(M + damping I)^-1 for the metrics of many layers, one factorisation per size.

    Args:
        metrics: one (E, r, r) batch per layer, symmetric positive semi-definite, fp32 or wider.
        damping: absolute, in the unit of the metrics (squared factor entries); >= 0.

    Returns:
        The inverses in the order given, and how many metrics needed more damping than asked for.

    Raises:
        FloatingPointError: a metric holds NaN or infinity.
    """
    together: dict[tuple[int, torch.dtype, torch.device], list[int]] = defaultdict(list)
    for index, metric in enumerate(metrics):
        together[metric.shape[-1], metric.dtype, metric.device].append(index)
    inverses: dict[int, Tensor] = {}
    escalated = 0
    for indexes in together.values():
        batch_Nrr, count = _damped_inverse(torch.cat([metrics[i] for i in indexes]), damping)
        escalated += count
        sizes = [metrics[i].shape[0] for i in indexes]
        inverses.update(zip(indexes, batch_Nrr.split(sizes), strict=True))
    return [inverses[i] for i in range(len(metrics))], escalated


def _damped_inverse(metrics_Nrr: Tensor, damping: float) -> tuple[Tensor, int]:
    """One batch, by Cholesky.

    A metric whose factorisation fails (rounding can leave a rank-deficient Gram matrix slightly
    indefinite) is tried again with ten times the damping until it succeeds; it is never replaced by
    the identity, which would silently turn the method into the plain gradient, as the reference
    code does.
    """
    eye = torch.eye(metrics_Nrr.shape[-1], dtype=metrics_Nrr.dtype, device=metrics_Nrr.device)
    factors, info = torch.linalg.cholesky_ex(metrics_Nrr + damping * eye)
    if not bool(info.any()):
        return torch.cholesky_inverse(factors), 0
    if not bool(torch.isfinite(metrics_Nrr).all()):
        raise FloatingPointError(
            "An expert's weights are NaN or infinite, so its Riemannian metric cannot be inverted; "
            "lower the learning rate (lr) or raise damping."
        )
    failed = info.nonzero().squeeze(1)
    escalated = len(failed)
    # With damping 0 there is nothing to multiply: start at the rounding error of the largest
    # metric.
    rounding = torch.finfo(metrics_Nrr.dtype).eps * float(metrics_Nrr.abs().amax().clamp(min=1.0))
    shift = max(damping, rounding)
    while len(failed):
        shift *= _ESCALATION
        retried, info = torch.linalg.cholesky_ex(metrics_Nrr[failed] + shift * eye)
        done = info == 0
        factors[failed[done]] = retried[done]
        failed = failed[~done]
    return torch.cholesky_inverse(factors), escalated
