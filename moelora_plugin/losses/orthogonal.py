"""Experts in different subspaces.

Shape suffixes: I in, O out, E experts, R the experts' ranks one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from .base import LossInput, require_option


def orthogonal(inputs: LossInput, *, of: str = "a") -> Tensor:
    """Mean over pairs of experts of how much their factors or updates overlap, in [0, 1].

        "a"     ||A_i A_j^T||^2 / (||A_i||^2 ||A_j||^2)                     Frobenius norms
        "ba"    <B_i A_i, B_j A_j>^2 / (||B_i A_i||^2 ||B_j A_j||^2)        the squared cosine

    The numerator of "a" is the orthogonality loss of O-LoRA (arXiv 2310.14152), there between the
    tasks of a sequence. The division is ours: without it the loss is least where A vanishes. It
    reads parameters only, so padding does not matter; a pair of which one is zero (B_i A_i at the
    start) counts as orthogonal.

    Args:
        inputs: the layer's experts.
        of: "a", the subspaces that experts read, or "ba", their updates. Experts that share A need
            "ba".

    Raises:
        ConfigError: another `of`, or the layer's router has no experts with factors beside it.
    """
    require_option(of in ("a", "ba"), "orthogonal.of", of, "'a' or 'ba'")
    pairs = inputs.experts()
    if not pairs:
        raise ConfigError(
            "aux_losses['orthogonal'] needs experts with factors A and B beside their router; set "
            "expert to 'lora' and site to 'linear', or remove this loss."
        )
    a_RI, b_OR = _wide(torch.cat([a for a, _ in pairs])), _wide(torch.cat([b for _, b in pairs], 1))
    owner_R = torch.tensor([e for e, (a, _) in enumerate(pairs) for _ in a], device=a_RI.device)
    owner_RE = torch.nn.functional.one_hot(owner_R, len(pairs)).to(a_RI.dtype)
    products_RR = a_RI @ a_RI.T
    if of == "a":
        overlap_EE = owner_RE.T @ products_RR.square() @ owner_RE
        norm_E = owner_RE.T @ products_RR.diagonal()
    else:
        # <B_i A_i, B_j A_j> without an (O, I) matrix: the sum of (B_i^T B_j) * (A_i A_j^T).
        inner_EE = owner_RE.T @ (products_RR * (b_OR.T @ b_OR)) @ owner_RE
        overlap_EE, norm_E = inner_EE.square(), inner_EE.diagonal()
    norms_EE = norm_E.unsqueeze(0) * norm_E.unsqueeze(1)
    # Without a direction there is no overlap, and no gradient. Each pair counts once.
    counted_EE = (norms_EE > 0).triu(1)
    shares_EE = overlap_EE / norms_EE.where(counted_EE, norms_EE.new_ones(()))
    number = len(pairs) * (len(pairs) - 1) // 2
    return (shares_EE * counted_EE).sum() / max(number, 1)


def _wide(factor: Tensor) -> Tensor:
    return factor.to(torch.promote_types(factor.dtype, torch.float32))
