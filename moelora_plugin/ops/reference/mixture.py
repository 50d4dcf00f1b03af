"""A mixture of LoRA experts written as the papers write it.

One Python loop over experts, autograd for every gradient, detach for the surrogates. Nothing in the
package calls this; tests hold every fast path to it, and `benchmarks/` times it as "how published
code computes it".

Shape suffixes: T tokens, I in, O out, E experts, R total rank; r is one expert's rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...types import GateRescale, GateRescaleScope


def moe_lora_loop(
    x_TI: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    weights_TE: Tensor,
    ranks: Sequence[int],
    scaling: float,
    gate_rescale: GateRescale = "none",
    gate_rescale_scope: GateRescaleScope = "weights",
) -> Tensor:
    """Sum over experts of g_i s B_i A_i x, with the surrogate backward spelled out by detaching.

    The value is sum_i g_i s B_i A_i x in every mode (arXiv 2502.15828, eq. 8). The gradient of A_i
    and B_i sees c_i = g_i^p in place of g_i:

        c_i E_i + (g_i - c_i) stop(E_i)         E_i = s B_i A_i x      (eq. 13, Algorithm 1)

    With scope "output", `stop` detaches the whole expert output, so x receives the surrogate as
    well (Algorithm 1 and the reference code). With scope "weights" it detaches A_i and B_i only, so
    x receives the true gradient (eq. 13 read literally: the hats stand on the matrices).

    Args:
        x_TI: inputs (T, I), dropout already applied.
        a_RI: stacked A (R, I).
        b_OR: stacked B (O, R).
        weights_TE: gates (T, E), zero where not selected.
        ranks: rank of each expert.
        scaling: LoRA scale s.
        gate_rescale: "none" (p = 1), "sqrt" (p = 1/2) or "exact" (p = 0 on selected experts).
        gate_rescale_scope: "weights" or "output".

    Returns:
        The update (T, O).
    """
    out_TO = x_TI.new_zeros(x_TI.shape[0], b_OR.shape[0])
    start = 0
    for expert, rank in enumerate(ranks):
        a_rI, b_Or = a_RI[start : start + rank], b_OR[:, start : start + rank]
        start += rank
        gate_T1 = weights_TE[:, expert : expert + 1]
        surrogate_T1 = _surrogate(gate_T1.detach(), gate_rescale)
        if gate_rescale_scope == "output":
            expert_TO = scaling * (x_TI @ a_rI.T) @ b_Or.T
            # stop() leaves g_i differentiable: the gates keep their ordinary gradient.
            out_TO = (
                out_TO + surrogate_T1 * expert_TO + (gate_T1 - surrogate_T1) * expert_TO.detach()
            )
        else:
            live_TO = scaling * (x_TI.detach() @ a_rI.T) @ b_Or.T
            frozen_TO = scaling * (x_TI @ a_rI.detach().T) @ b_Or.detach().T
            out_TO = out_TO + surrogate_T1 * (live_TO - live_TO.detach()) + gate_T1 * frozen_TO
    return out_TO


def _surrogate(gate: Tensor, gate_rescale: GateRescale) -> Tensor:
    if gate_rescale == "none":
        return gate
    if gate_rescale == "sqrt":
        return gate.sqrt()
    return (gate != 0).to(gate.dtype)


def topk_softmax_loop(logits_TE: Tensor, top_k: int) -> Tensor:
    """Softmax over all experts, keep the `top_k` largest, divide by their sum, token by token."""
    rows = []
    for logits_E in logits_TE:
        probs_E = torch.softmax(logits_E, dim=0)
        kept_K = torch.argsort(probs_E, descending=True)[:top_k]
        mask_E = torch.zeros_like(probs_E)
        mask_E[kept_K] = 1
        rows.append(probs_E * mask_E / (probs_E * mask_E).sum())
    return torch.stack(rows)


def precondition_loop(
    a_RI: Tensor,
    b_OR: Tensor,
    grad_a_RI: Tensor,
    grad_b_OR: Tensor,
    ranks: Sequence[int],
    damping: float,
) -> tuple[Tensor, Tensor]:
    """Eq. 6 of arXiv 2502.15828 with damping, one expert at a time, by explicit inverses.

    grad_A_i <- (B_i^T B_i + damping I)^-1 grad_A_i and grad_B_i <- grad_B_i (A_i A_i^T + damping
    I)^-1.
    """
    new_a, new_b = torch.empty_like(grad_a_RI), torch.empty_like(grad_b_OR)
    start = 0
    for rank in ranks:
        block = slice(start, start + rank)
        start += rank
        eye = torch.eye(rank, dtype=a_RI.dtype)
        a_rI, b_Or = a_RI[block], b_OR[:, block]
        new_a[block] = torch.linalg.inv(b_Or.T @ b_Or + damping * eye) @ grad_a_RI[block]
        new_b[:, block] = grad_b_OR[:, block] @ torch.linalg.inv(a_rI @ a_rI.T + damping * eye)
    return new_a, new_b
