"""Arrow's prototypes: the input direction that each expert answers most.

Shape suffixes: I in, O out, E experts; r is one expert's rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def arrow_prototypes(experts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The top right singular vector of each B_i A_i     (Arrow, arXiv 2405.11157, section 3.2).

    With B = Q_B R_B and A^T = Q_A R_A the product is Q_B (R_B R_A^T) Q_A^T, so the singular vectors
    are those of an (r, r) matrix, turned by Q_A: B A is never formed. The sign, which means
    nothing, makes the entry of largest magnitude positive. PEFT's Arrow takes fifteen power
    iterations from a random start instead, which agree where the first two singular values are
    apart.

    Args:
        experts: (A_i (r, I), B_i (O, r)) each; the ranks may differ.

    Returns:
        (E, I) of length 1 in fp32 or wider. An expert whose B is zero is judged by its A alone, so
        that a fresh one has a direction; one that is all zero has the prototype zero.
    """
    return torch.stack([_top_right_singular_vector(a, b) for a, b in experts])


def _top_right_singular_vector(a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.promote_types(a.dtype, torch.float32)
    q_a, r_a = torch.linalg.qr(a.detach().to(dtype).T)
    r_b = torch.linalg.qr(b.detach().to(dtype))[1]
    small = r_b @ r_a.T if bool(b.any()) else r_a.T
    _, values, right = torch.linalg.svd(small)
    vector_I: Tensor = q_a @ right[0]
    largest = vector_I[vector_I.abs().argmax()]
    oriented_I: Tensor = vector_I * largest.sign() * (values[0] > 0)
    return oriented_I
