"""The auxiliary losses written as their papers write them: token by token, expert by expert.

Every function takes real tokens only: a caller drops the padding before.

Shape suffixes: T tokens, E experts, O out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def switch_lb_loop(probs_TE: Tensor, weights_TE: Tensor, share: str = "tokens") -> Tensor:
    """E * sum_e f_e P_e (arXiv 2101.03961, eq. 4 to 6)."""
    tokens, experts = probs_TE.shape
    counts = [sum(float(weights_TE[t, e] > 0) for t in range(tokens)) for e in range(experts)]
    of = tokens if share == "tokens" else sum(counts)
    total = probs_TE.new_zeros(())
    for e in range(experts):
        mean = torch.stack([probs_TE[t, e] for t in range(tokens)]).sum() / tokens
        total = total + counts[e] / of * mean
    return experts * total


def z_loop(logits_TE: Tensor) -> Tensor:
    """Mean of (log sum exp)^2 (arXiv 2202.08906, eq. 5)."""
    return torch.stack([row.exp().sum().log() ** 2 for row in logits_TE]).sum() / len(logits_TE)


def cv_squared_loop(values: Sequence[Tensor], correction: int = 0) -> Tensor:
    """Variance over squared mean."""
    mean = torch.stack(list(values)).sum() / len(values)
    squares = torch.stack([(value - mean) ** 2 for value in values]).sum()
    return squares / (len(values) - correction) / mean**2


def column_sums_cv_squared_loop(values_TE: Tensor) -> Tensor:
    """CV^2 over experts of the sums over tokens (arXiv 1701.06538, eq. 7 and 11)."""
    return cv_squared_loop(
        [torch.stack([row[e] for row in values_TE]).sum() for e in range(values_TE.shape[1])]
    )


def localized_cv2_loop(
    sequences: Sequence[Tensor], types: Sequence[int], delta: float = 0.1
) -> Tensor:
    """LoRAMoE's localized balancing (arXiv 2312.09979) of each sequence's weights (its T, E)."""
    entries = []
    for weights_TE, kind in zip(sequences, types, strict=True):
        experts = weights_TE.shape[1]
        for e in range(experts):
            own = 1 if e < experts // 2 else 0
            factor = 1 + delta if own == kind else 1 - delta
            entries.append(factor * torch.stack([row[e] for row in weights_TE]).sum())
    return cv_squared_loop(entries, correction=1)


def entropy_loop(probs_TE: Tensor) -> Tensor:
    """Mean entropy of a token's routing, with 0 log 0 = 0."""
    total = probs_TE.new_zeros(())
    for row in probs_TE:
        for share in row / row.sum():
            if share > 0:
                total = total - share * share.log()
    return total / len(probs_TE)


def rsl_loop(probs_TE: Tensor, weights_TE: Tensor, entropy: float = 0.1) -> Tensor:
    """LoRA-Mixer's loss (arXiv 2507.00029v2, eq. 5)."""
    balance = switch_lb_loop(probs_TE, weights_TE) / probs_TE.shape[1]
    return balance - entropy * entropy_loop(probs_TE)


def lambda_sparsity_loop(
    logits_TE: Tensor, lambda_T: Tensor, form: str = "analytic", k: int = 2
) -> Tensor:
    """LD-MoLE's sparsity control (arXiv 2509.25684)."""
    total = lambda_T.new_zeros(())
    for logits_E, value in zip(logits_TE.detach(), lambda_T, strict=True):
        if form == "mean":
            total = total + 1 - value
            continue
        ordered = sorted(logits_E.tolist(), reverse=True)
        lower = 1 - (sum(ordered[:k]) - k * ordered[k])
        if lower > value:
            total = total + lower - value
    return total / len(lambda_T)


def contrastive_loop(outputs_TEO: Tensor, weights_TE: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE over all pairs of outputs of selected experts (after arXiv 2402.12851)."""
    found = [
        (e, outputs_TEO[t, e] / outputs_TEO[t, e].norm())
        for t in range(len(outputs_TEO))
        for e in range(outputs_TEO.shape[1])
        if weights_TE[t, e] > 0 and outputs_TEO[t, e].norm() > 0
    ]
    terms = []
    for a, p in itertools.permutations(range(len(found)), 2):
        if found[a][0] != found[p][0]:
            continue
        positive = (found[a][1] @ found[p][1] / temperature).exp()
        negatives = [
            (found[a][1] @ vector / temperature).exp() for e, vector in found if e != found[a][0]
        ]
        terms.append(-(positive / (positive + sum(negatives))).log())
    return torch.stack(terms).sum() / len(terms) if terms else outputs_TEO.new_zeros(())


def orthogonal_loop(experts: Sequence[tuple[Tensor, Tensor]], of: str = "a") -> Tensor:
    """Overlap of experts' subspaces or updates, pair by pair."""
    overlaps = []
    for (a, b), (other_a, other_b) in itertools.combinations(experts, 2):
        if of == "a":
            squares = [(x @ y) ** 2 for x in a for y in other_a]
            norms = (a**2).sum() * (other_a**2).sum()
            overlaps.append(torch.stack(squares).sum() / norms)
        else:
            one, two = b @ a, other_b @ other_a
            overlaps.append((one * two).sum() ** 2 / ((one**2).sum() * (two**2).sum()))
    return torch.stack(overlaps).mean()
