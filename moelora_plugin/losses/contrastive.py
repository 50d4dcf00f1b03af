"""MoELoRA's contrastive loss: what one expert says differs from what the others say.

Shape suffixes: T tokens, M sampled tokens, E experts, O out, N sampled outputs (M times E).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ConfigError
from .base import LossInput, require_option


def contrastive(
    inputs: LossInput, *, temperature: float = 0.1, max_tokens: int | None = 64
) -> Tensor:
    """InfoNCE over the outputs of the selected experts     (MoELoRA, Luo et al., arXiv 2402.12851).

    Two outputs of one expert, on different tokens, are a positive pair; outputs of other experts
    (on any token) are the negatives. With the cosine c of two outputs, the loss is the mean over
    positive pairs (a, p) of

        -log( exp(c_ap / tau) / (exp(c_ap / tau) + sum_n exp(c_an / tau)) )

    Only experts that a token selects take part. An output of exactly zero (all of them are, while B
    is zero) has no direction and does not either.

    The paper gives pairs and the InfoNCE form; the cosine, the mean over pairs and the sample are
    ours, since no public code was found. `max_tokens` bounds memory: the sample is spread evenly
    over the real tokens, without chance, so that a recomputation under activation checkpointing
    takes the same one.

    Args:
        inputs: the layer's routing and the experts' outputs.
        temperature: tau, above 0.
        max_tokens: M, tokens that take part, at least 2; None for all.

    Raises:
        ConfigError: an option out of range, or the layer's router has no experts beside it.
    """
    require_option(temperature > 0, "contrastive.temperature", temperature, "a number above 0")
    require_option(
        max_tokens is None or max_tokens >= 2,
        "contrastive.max_tokens",
        max_tokens,
        "an integer of at least 2 or None",
    )
    if inputs.outputs is None:
        raise ConfigError(
            "aux_losses['contrastive'] needs the router and its experts in one layer; set site to "
            "'linear'."
        )
    weights_TE = inputs.routing.weights
    index_M, taken_M = _sample(inputs.real, weights_TE, max_tokens)
    # A universal expert comes last; nobody selects it.
    outputs_MEO = inputs.outputs(index_M)[:, : weights_TE.shape[1]]
    outputs_MEO = outputs_MEO.to(torch.promote_types(outputs_MEO.dtype, torch.float32))
    tokens, experts, features = outputs_MEO.shape

    outputs_NO = outputs_MEO.reshape(-1, features)
    norms_N = torch.linalg.vector_norm(outputs_NO.detach(), dim=-1)
    valid_N = ((weights_TE[index_M] > 0) & taken_M.unsqueeze(-1)).flatten() & (norms_N > 0)
    # Invalid rows are replaced before the division: a norm of 0 has no gradient.
    safe_NO = torch.where(valid_N.unsqueeze(-1), outputs_NO, torch.ones_like(outputs_NO))
    unit_NO = safe_NO / torch.linalg.vector_norm(safe_NO, dim=-1, keepdim=True)
    cosine_NN = unit_NO @ unit_NO.T / temperature

    expert_N = torch.arange(experts, device=valid_N.device).repeat(tokens)
    same_NN = expert_N.unsqueeze(0) == expert_N.unsqueeze(1)
    valid_NN = valid_N.unsqueeze(0) & valid_N.unsqueeze(1)
    itself_NN = torch.eye(len(valid_N), dtype=torch.bool, device=valid_N.device)
    positive_NN = valid_NN & same_NN & ~itself_NN
    negatives_N = cosine_NN.masked_fill(~valid_NN | same_NN, -math.inf).logsumexp(-1)
    loss_NN: Tensor = torch.logaddexp(cosine_NN, negatives_N.unsqueeze(-1)) - cosine_NN
    mean: Tensor = (loss_NN * positive_NN).sum() / positive_NN.sum().clamp(min=1)
    return mean


def _sample(
    real_T: Tensor | None, weights_TE: Tensor, max_tokens: int | None
) -> tuple[Tensor, Tensor]:
    """Indexes of M tokens, evenly spread over the real ones, and whether each takes part (M,).

    Where there are fewer real tokens than M, they come more than once and take part once.
    """
    tokens, device = len(weights_TE), weights_TE.device
    size = tokens if max_tokens is None else min(tokens, max_tokens)
    if real_T is None:
        real_T = torch.ones(tokens, dtype=torch.bool, device=device)
    order_T = torch.argsort((~real_T).to(torch.int8), stable=True)  # the real ones first
    count = real_T.sum()
    position_M = torch.arange(size, device=device) * count // size
    fresh_M = torch.cat([position_M.new_ones(1), position_M[1:] - position_M[:-1]]) > 0
    return order_T[position_M], fresh_M & (count > 0)
