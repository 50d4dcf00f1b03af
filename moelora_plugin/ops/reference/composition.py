"""Composing adapters that exist already, token by token, with every product spelled out.

Shape suffixes: I in, O out, H hidden, E experts; r is one adapter's rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# (A (r, I), B (O, r), the adapter's own scale alpha / r).
Lora = tuple[Tensor, Tensor, float]


def arrow_loop(x: Tensor, loras: Sequence[Lora], top_k: int) -> Tensor:
    """Arrow's update (T, O) (arXiv 2405.11157): experts by |x . v|, v from the SVD of B A itself.

    The softmax runs over the k best scores.
    """
    prototypes = [torch.linalg.svd(b @ a).Vh[0] for a, b, _ in loras]
    rows = []
    for token_I in x:
        scores = [abs(float(token_I @ v)) for v in prototypes]
        chosen = sorted(range(len(loras)), key=lambda i: -scores[i])[:top_k]
        total = sum(torch.tensor(scores[i]).double().exp() for i in chosen)
        row_O = 0 * (loras[0][1] @ loras[0][0] @ token_I)
        for i in chosen:
            a, b, scale = loras[i]
            gate = float(torch.tensor(scores[i]).double().exp() / total)
            row_O = row_O + gate * scale * (b @ (a @ token_I))
        rows.append(row_O)
    return torch.stack(rows)


def general_knowledge_subtracted(
    loras: Sequence[Lora], general: Sequence[tuple[Tensor, Tensor]]
) -> list[Lora]:
    """GenKnowSub (arXiv 2505.10939) as its authors compute it: A and B less their means, apart."""
    mean_a = sum((a for a, _ in general), 0 * general[0][0]) / len(general)
    mean_b = sum((b for _, b in general), 0 * general[0][1]) / len(general)
    return [(a - mean_a, b - mean_b, scale) for a, b, scale in loras]


def concatenated(loras: Sequence[Lora], weights: Sequence[float]) -> Tensor:
    """CAT's weight update (O, I) (arXiv 2410.13025): one LoRA of all ranks, B's parts weighted."""
    a = torch.cat([a for a, _, _ in loras])
    b = torch.cat([w * scale * b for (_, b, scale), w in zip(loras, weights, strict=True)], dim=1)
    return b @ a


def xlora_scalings_loop(
    hidden: Tensor,
    weights: Sequence[tuple[Tensor, Tensor]],
    experts: int,
    layers: int,
    temperature: float = 1.0,
) -> Tensor:
    """X-LoRA's scalings (T, layers, E) (arXiv 2402.07148) from the last hidden states (T, H).

    Args:
        hidden: from the first pass.
        weights: (W, bias) of each linear map; ReLU stands between them. The last map gives E
            logits for all layers alike, or E for each of them.
        experts: E.
        layers: adapted linears.
        temperature: of the softmax over the experts.
    """
    rows = []
    for token_H in hidden:
        h = token_H
        for i, (weight, bias) in enumerate(weights):
            h = weight @ (h if i == 0 else h.clamp(min=0)) + bias
        parts = h.split(experts) if len(h) == experts * layers else [h] * layers
        rows.append(torch.stack([_softmax(part, temperature) for part in parts]))
    return torch.stack(rows)


def _softmax(logits: Tensor, temperature: float) -> Tensor:
    powers = [(logit / temperature).exp() for logit in logits]
    return torch.stack([power / sum(powers) for power in powers])
