"""Routers written from their papers' formulas: one row at a time, in Python, with autograd.

Shape suffixes: N rows, S rows of a sequence, E experts, K selected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def softmax_loop(logits_NE: Tensor) -> Tensor:
    """exp(u_i) over the sum of all."""
    rows = []
    for logits_E in logits_NE:
        powers = [torch.exp(logit) for logit in logits_E]
        rows.append(torch.stack([power / sum(powers) for power in powers]))
    return torch.stack(rows)


def top_p_loop(logits_NE: Tensor, p: float) -> Tensor:
    """The likeliest experts until their probabilities reach p, the one that crosses included."""
    rows = []
    for probs_E in softmax_loop(logits_NE):
        values = probs_E.tolist()
        gates = [torch.zeros_like(probs_E[0])] * len(values)
        reached = 0.0
        for expert in sorted(range(len(values)), key=lambda i: -values[i]):
            if reached >= p:
                break
            gates[expert] = probs_E[expert]
            reached += values[expert]
        rows.append(torch.stack(gates))
    return torch.stack(rows)


def threshold_loop(logits_NE: Tensor, threshold_N: Tensor) -> Tensor:
    """AdaMoLE, arXiv 2405.00361: max(p_i - t, 0) over their sum."""
    rows = []
    for probs_E, threshold in zip(softmax_loop(logits_NE), threshold_N, strict=True):
        above = [prob - threshold if prob >= threshold else 0 * prob for prob in probs_E]
        total = sum(above)
        rows.append(torch.stack([a / total if total > 0 else a for a in above]))
    return torch.stack(rows)


def sparsegen_loop(logits_NE: Tensor, lambda_N: Tensor) -> Tensor:
    """LD-MoLE, arXiv 2509.25684: max(u_i - tau, 0) / (1 - lambda), trying every support size.

    With the k largest logits as support, tau_k = (their sum - (1 - lambda)) / k makes the result
    sum to 1; k is right where tau_k lies below the k-th logit and not below the next.
    """
    rows = []
    for logits_E, lam in zip(logits_NE, lambda_N, strict=True):
        ordered = sorted(logits_E, key=lambda logit: -logit.item())
        for k in range(1, len(ordered) + 1):
            tau = (sum(ordered[:k]) - (1 - lam)) / k
            if ordered[k - 1] > tau and (k == len(ordered) or ordered[k] <= tau):
                break
        rows.append(torch.stack([(u - tau if u > tau else 0 * u) / (1 - lam) for u in logits_E]))
    return torch.stack(rows)


def sigmoid_loop(logits_NE: Tensor, threshold_N: Tensor | None = None) -> Tensor:
    """MoA, arXiv 2506.05928: 1 / (1 + exp(-u_i)) where that reaches the threshold."""
    rows = []
    for row, logits_E in enumerate(logits_NE):
        gates = [1 / (1 + torch.exp(-logit)) for logit in logits_E]
        if threshold_N is not None:
            gates = [gate if gate >= threshold_N[row] else 0 * gate for gate in gates]
        rows.append(torch.stack(gates))
    return torch.stack(rows)


def relu_loop(logits_NE: Tensor) -> Tensor:
    """ReMoE, arXiv 2412.14711: the positive part."""
    return torch.stack(
        [torch.stack([u if u > 0 else 0 * u for u in logits_E]) for logits_E in logits_NE]
    )


def hard_loop(preference_NE: Tensor, top_k: int = 1) -> Tensor:
    """Gate 1 for the k experts that come first."""
    rows = []
    for preference_E in preference_NE:
        values = preference_E.tolist()
        order = sorted(range(len(values)), key=lambda i: -values[i])
        rows.append([float(expert in order[:top_k]) for expert in range(len(preference_E))])
    return torch.tensor(rows, dtype=preference_NE.dtype)


def noisy_topk_loop(
    logits_NE: Tensor, sigma_NE: Tensor, noise_NE: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """ArXiv 1701.06538, eq. 3 to 5 for the gates and eq. 8 and 9 for the load's probability."""
    gates, loads = [], []
    for logits_E, sigma_E, noise_E in zip(logits_NE, sigma_NE, noise_NE, strict=True):
        noisy = [u + s * n for u, s, n in zip(logits_E, sigma_E, noise_E, strict=True)]
        kept = sorted(range(len(noisy)), key=lambda i: -noisy[i].item())[:top_k]
        total = sum(torch.exp(noisy[i]) for i in kept)
        gates.append(
            torch.stack([torch.exp(h) / total if i in kept else 0 * h for i, h in enumerate(noisy)])
        )
        load = []
        for i, (logit, sigma) in enumerate(zip(logits_E, sigma_E, strict=True)):
            others = sorted((h for j, h in enumerate(noisy) if j != i), key=lambda h: -h.item())
            z = (logit - others[top_k - 1]) / sigma
            load.append((1 + torch.erf(z / math.sqrt(2))) / 2)
        loads.append(torch.stack(load))
    return torch.stack(gates), torch.stack(loads)


def expert_choice_loop(
    logits_NE: Tensor, capacity_factor: float, batch: int, real_N: Tensor | None = None
) -> Tensor:
    """ArXiv 2202.09368, eq. 1 and 2, sequence by sequence."""
    probs_NE = softmax_loop(logits_NE)
    experts, length = logits_NE.shape[1], len(logits_NE) // batch
    taken = torch.zeros_like(probs_NE)
    for sequence in range(batch):
        rows = [
            row
            for row in range(sequence * length, (sequence + 1) * length)
            if real_N is None or bool(real_N[row])
        ]
        capacity = max(round(len(rows) * capacity_factor / experts), 1)
        for expert in range(experts):
            best = sorted(rows, key=lambda row: -probs_NE[row, expert].item())
            for row in best[:capacity]:
                taken[row, expert] = 1
    return probs_NE * taken


def sinkhorn_loop(logits_NE: Tensor, iterations: int, real_N: Tensor | None = None) -> Tensor:
    """exp(logits), its rows and its columns divided by their sums in turn."""
    plan = [[math.exp(u.item()) for u in logits_E] for logits_E in logits_NE]
    counted = [n for n in range(len(plan)) if real_N is None or bool(real_N[n])]
    for _ in range(iterations):
        plan = [[value / sum(row) for value in row] for row in plan]
        sums = [sum(plan[n][e] for n in counted) for e in range(len(plan[0]))]
        plan = [[value / total for value, total in zip(row, sums, strict=True)] for row in plan]
    return torch.tensor(plan, dtype=logits_NE.dtype)


def capacity_loop(
    weights_NE: Tensor, capacities: Sequence[int], real_N: Tensor | None = None
) -> Tensor:
    """Switch Transformers, arXiv 2101.03961: gates after an expert is full are zero.

    Args:
        weights_NE: gates of the sequences' rows, in order.
        capacities: of each sequence.
        real_N: True where a row is not padding.
    """
    kept = torch.zeros_like(weights_NE)
    wanted = (weights_NE != 0).tolist()
    length = len(weights_NE) // len(capacities)
    for sequence, capacity in enumerate(capacities):
        for expert in range(weights_NE.shape[1]):
            taken = 0
            for row in range(sequence * length, (sequence + 1) * length):
                real = real_N is None or bool(real_N[row])
                wants = wanted[row][expert]
                if not real or (wants and taken < capacity):
                    kept[row, expert] = 1
                taken += int(real and wants)
    return weights_NE * kept
