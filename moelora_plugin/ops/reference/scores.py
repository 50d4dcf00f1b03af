"""Scores and pooled inputs as their papers write them: one row, one expert, one feature at a time.

Shape suffixes: N rows, I in, E experts, R total rank, B sequences, S positions, H hidden, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def _dot(u: Tensor, v: Tensor) -> Tensor:
    return torch.stack([a * b for a, b in zip(u, v, strict=True)]).sum()


def _length(v: Tensor) -> Tensor:
    return _dot(v, v).sqrt()


def _map(weight: Tensor, x_I: Tensor) -> Tensor:
    return torch.stack([_dot(row, x_I) for row in weight])


def _by_row(x_NI: Tensor, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([logits_of(x_I) for x_I in x_NI])


def _experts(a_RI: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    starts = [sum(ranks[:expert]) for expert in range(len(ranks))]
    return [a_RI[start : start + rank] for start, rank in zip(starts, ranks, strict=True)]


def mlp_score_loop(
    x_NI: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gates: Sequence[Tensor | None],
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """W_n act(... act(W_1 x + b_1)) + b_n, a hidden layer being act(W x) * V x where it has a V."""

    def logits_of(h: Tensor) -> Tensor:
        for layer, (weight, bias, gate) in enumerate(zip(weights, biases, gates, strict=True)):
            out = _map(weight, h)
            out = out if bias is None else out + bias
            if layer == len(weights) - 1:
                return out
            h = activation(out) if gate is None else activation(out) * _map(gate, h)
        raise AssertionError("there is a last layer")

    return _by_row(x_NI, logits_of)


def cosine_score_loop(
    x_NI: Tensor, directions_ED: Tensor, temperature: Tensor, projection_DI: Tensor | None = None
) -> Tensor:
    """v_i . P x / (|v_i| |P x| tau)."""

    def logits_of(x_I: Tensor) -> Tensor:
        h = x_I if projection_DI is None else _map(projection_DI, x_I)
        return torch.stack([_dot(v, h) / (_length(v) * _length(h)) for v in directions_ED])

    return _by_row(x_NI, logits_of) / temperature


def prototype_score_loop(x_NI: Tensor, prototypes_EI: Tensor, compare: str) -> Tensor:
    """Arrow's |v . x| ("abs"), v . x ("dot"), or PHATGOOSE's product of standardised vectors."""

    def standardized(v: Tensor) -> Tensor:
        centred = v - v.sum() / len(v)
        variance = _dot(centred, centred) / len(v)
        return centred / (variance + 1e-5).sqrt()

    def logit(v: Tensor, x_I: Tensor) -> Tensor:
        if compare == "standardized":
            return _dot(standardized(v), standardized(x_I)) / math.sqrt(len(v))
        return _dot(v, x_I).abs() if compare == "abs" else _dot(v, x_I)

    return _by_row(x_NI, lambda x_I: torch.stack([logit(v, x_I) for v in prototypes_EI]))


def embedding_score_loop(
    ids: Sequence[int],
    embedding: Tensor,
    gate_ED: Tensor | None = None,
    bias_E: Tensor | None = None,
) -> Tensor:
    """W e[id] + b, or the row of logits itself."""
    rows = [
        embedding[index] if gate_ED is None else _map(gate_ED, embedding[index]) for index in ids
    ]
    return torch.stack([row if bias_E is None else row + bias_E for row in rows])


def self_norm_score_loop(x_NI: Tensor, a_RI: Tensor, ranks: Sequence[int]) -> Tensor:
    """||A_i x||_2."""
    return _by_row(
        x_NI, lambda x_I: torch.stack([_length(_map(a, x_I)) for a in _experts(a_RI, ranks)])
    )


def self_rank_score_loop(x_NI: Tensor, a_EI: Tensor, normalize: str = "none") -> Tensor:
    """a_i . x, over the norm of all of them ("rows") or over |a_i| |x| ("cosine")."""

    def logits_of(x_I: Tensor) -> Tensor:
        activations_E = _map(a_EI, x_I)
        if normalize == "rows":
            return activations_E / _length(activations_E)
        if normalize == "cosine":
            lengths = [_length(a_I) * _length(x_I) for a_I in a_EI]
            return activations_E / torch.stack(lengths)
        return activations_E

    return _by_row(x_NI, logits_of)


def multi_score_loop(
    x_NI: Tensor, main_MI: Tensor, subs: Sequence[Tensor], top: int | None = None
) -> Tensor:
    """The distribution sum_m main_m softmax(sub_m), not its logarithm."""

    def probs_of(x_I: Tensor) -> Tensor:
        main_M = _map(main_MI, x_I)
        best = sorted(range(len(subs)), key=main_M.tolist().__getitem__, reverse=True)[:top]
        shares = torch.softmax(main_M[best], 0)
        return torch.stack(
            [
                share * torch.softmax(_map(subs[m], x_I), 0)
                for share, m in zip(shares, best, strict=True)
            ]
        ).sum(0)

    return _by_row(x_NI, probs_of)


def recurrent_score_loop(
    x_NI: Tensor,
    a_RI: Tensor,
    ranks: Sequence[int],
    projection_DI: Tensor,
    readout_ED: Tensor,
    cell: torch.nn.GRUCell,
    rounds: int,
) -> Tensor:
    """Rounds of asking the experts and updating the state by torch's own GRU cell."""

    def logits_of(x_I: Tensor) -> Tensor:
        state_D = torch.tanh(_map(projection_DI, x_I))
        for _ in range(rounds - 1):
            probs_E = torch.softmax(_map(readout_ED, state_D), 0)
            experts = zip(probs_E, _experts(a_RI, ranks), strict=True)
            message_r = torch.stack([prob * _map(a_rI, x_I) for prob, a_rI in experts]).sum(0)
            state_D = cell(message_r, state_D)
        return _map(readout_ED, state_D)

    return _by_row(x_NI, logits_of)


def pool_loop(x_BSI: Tensor, chosen_BS: Tensor, pool: str) -> Tensor:
    """Features of each sequence's chosen positions, pooled; of the first where there are none."""
    pooled = []
    for x_SI, chosen_S in zip(x_BSI, chosen_BS.tolist(), strict=True):
        kept = [x_I for x_I, chosen in zip(x_SI, chosen_S, strict=True) if chosen] or [x_SI[0]]
        if pool == "first":
            pooled.append(kept[0])
        elif pool == "last":
            pooled.append(kept[-1])
        elif pool == "max":
            pooled.append(torch.stack(kept).amax(0))
        else:
            pooled.append(sum(kept[1:], kept[0]) / len(kept))
    return torch.stack(pooled)
