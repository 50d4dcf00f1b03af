"""Riemannian preconditioning of (A, B) pairs, batched over experts and layers.

Per expert i (arXiv 2502.15828, eq. 6, with damping):

    grad_A_i <- (B_i^T B_i + damping I)^-1 grad_A_i
    grad_B_i <- grad_B_i (A_i A_i^T + damping I)^-1

Where the experts share A, its metric is sum_i B_i^T B_i, and every B_i has the one of A; where they
share B, the other way round.

The r x r metrics of all experts of all layers that share r are factorised together in one call.
The products with the factors are one batched call per factor, which reads it where it lies.

Shape suffixes: I in, O out, E experts, R total rank (of padded experts where their ranks differ); r
is one expert's rank. N counts the experts of all layers. Experts also go in G blocks of b
neighbours, q = b r ranks each.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import Shared

# Each retry multiplies the damping of the metrics that failed. A finite Gram matrix plus a shift
# beyond its rounding error is positive definite, so a handful of retries always suffices.
_ESCALATION = 10.0

# B's rows hold r entries of one expert after the other. Products as wide as a cache line (16
# entries of fp32) over neighbouring experts cost less than those of single experts, though most of
# what they compute lies beside the experts' own (measured on a CPU, for r from 4 to 32).
_BLOCK_WIDTH = 16


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
    padded: Tensor = _pad(factor, ranks, dim).unflatten(dim, (len(ranks), -1))
    return padded if dim == 0 else padded.permute(1, 2, 0)


def join_experts(experts: Tensor, ranks: Sequence[int], dim: int) -> Tensor:
    """Inverse of `split_experts`: from (E, r, n) back to the stacked factor, padding dropped."""
    rows = experts.flatten(0, 1)
    return _drop_padding(rows if dim == 0 else rows.T, ranks, dim)


def _pad(factor: Tensor, ranks: Sequence[int], dim: int) -> Tensor:
    """A stacked factor with zeros, so that every expert has the largest rank."""
    if len(set(ranks)) == 1:
        return factor
    shape = list(factor.shape)
    shape[dim] = len(ranks) * max(ranks)
    return factor.new_zeros(shape).index_copy_(dim, _kept(ranks, factor.device), factor)


def _drop_padding(padded: Tensor, ranks: Sequence[int], dim: int) -> Tensor:
    """Inverse of `_pad`."""
    if len(set(ranks)) == 1:
        return padded
    return padded.index_select(dim, _kept(ranks, padded.device))


def _kept(ranks: Sequence[int], device: torch.device) -> Tensor:
    """Where the ranks (R,) lie in the padded factor."""
    starts = range(0, len(ranks) * max(ranks), max(ranks))
    places = [start + i for start, rank in zip(starts, ranks, strict=True) for i in range(rank)]
    return torch.tensor(places, device=device)


def gram(experts: Tensor) -> Tensor:
    """Metrics of (E, r, n) factors: (E, r, r), in fp32 or wider.

    TF32 products would lose the small eigenvalues that the damping is there to keep, so the product
    runs in full precision whatever the global switch says.
    """
    dtype = torch.promote_types(experts.dtype, torch.float32)
    wide = experts.to(torch.float64 if experts.is_cuda and _tf32_allowed() else dtype)
    return (wide @ wide.mT).to(dtype)


def _tf32_allowed() -> bool:
    """Whether products of fp32 matrices may run in TF32 on a CUDA device."""
    matmul = torch.backends.cuda.matmul
    # Where a program has used the new switch, reading the old one is an error; torch 2.8 has the
    # old one alone.
    precision = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32) if precision is None else precision == "tf32"


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
    if shared not in ("none", side):
        ranks = ranks[:1]
    if side == "a":
        metric = _gram_of_blocks(_pad(partner, ranks, 1), len(ranks))
    else:
        metric = gram(split_experts(partner, ranks, 0))
    return metric.sum(0, keepdim=True) if shared == side else metric


def precondition(
    inverse: Tensor, grad: Tensor, side: str, ranks: Sequence[int], shared: Shared
) -> Tensor:
    """The gradient of one factor, times the inverse of what `metric_of` gave. No autograd.

    Args:
        inverse: (E, max r, max r) or (1, r, r), fp32 or wider.
        grad: of the factor A (R, I) for side "a", of B (O, R) for side "b"; (r, I) or (O, r) where
            the experts share it.
        side: whose gradient this is, "a" or "b".
        ranks: rank of each expert.
        shared: which factor the experts share.

    Returns:
        As `grad` in shape and dtype, contiguous.
    """
    if shared == side:
        ranks = ranks[:1]
    wide = grad.to(inverse.dtype)
    if side == "a":
        result = join_experts(inverse @ split_experts(wide, ranks, 0), ranks, 0)
    else:
        inverse_Err = inverse.expand(len(ranks), -1, -1)
        result = _drop_padding(_times_blocks(_pad(wide, ranks, 1), inverse_Err), ranks, 1)
    return result.to(grad.dtype).contiguous()


@functools.cache
def _experts_per_block(num_experts: int, rank: int) -> int:
    """How many neighbouring experts B's products take together: as near to the width as may be."""
    return min(
        (block for block in range(1, num_experts + 1) if num_experts % block == 0),
        key=lambda block: abs(math.log(block * rank / _BLOCK_WIDTH)),
    )


def _gram_of_blocks(b_OR: Tensor, num_experts: int) -> Tensor:
    """Metrics of stacked B (O, R) with equal ranks: (E, r, r), cut out of those of whole blocks."""
    block = _experts_per_block(num_experts, b_OR.shape[1] // num_experts)
    gram_Gqq = gram(b_OR.unflatten(1, (num_experts // block, -1)).permute(1, 2, 0))
    if block == 1:
        return gram_Gqq
    pairs_Gbrbr: Tensor = gram_Gqq.unflatten(2, (block, -1)).unflatten(1, (block, -1))
    return pairs_Gbrbr.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).flatten(0, 1)


def _times_blocks(grad_OR: Tensor, inverse_Err: Tensor) -> Tensor:
    """(O, R) times the inverses; those of a block lie on the diagonal of one (q, q) matrix."""
    num_experts, rank, _ = inverse_Err.shape
    block = _experts_per_block(num_experts, rank)
    inverse_Gqq = inverse_Err
    if block > 1:
        eye = torch.eye(block, dtype=grad_OR.dtype, device=grad_OR.device)
        pairs_Gbrbr = inverse_Err.unflatten(0, (-1, block)).unsqueeze(3) * eye[:, None, :, None]
        inverse_Gqq = pairs_Gbrbr.flatten(3, 4).flatten(1, 2)
    # Written where it belongs: the product's own layout would be another one.
    result_OR = torch.empty_like(grad_OR, memory_format=torch.contiguous_format)
    grad_GOq, result_GOq = (
        tensor.unflatten(1, (num_experts // block, -1)).transpose(0, 1)
        for tensor in (grad_OR, result_OR)
    )
    torch.bmm(grad_GOq, inverse_Gqq, out=result_GOq)
    return result_OR


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
