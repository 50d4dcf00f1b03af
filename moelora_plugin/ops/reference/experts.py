"""Every expert kind as a plain sum of weighed terms, and the metrics of shared factors.

A mixture is written as a list of terms (gate, function): sum_i g_i E_i(x). Where a kind's gates
meet each other, each pair of experts is a term of its own, with the product of their gates. The
surrogate backward is spelled out on that sum as in `mixture`, which is what the fast paths, which
never form the terms, must agree with.

Shape suffixes: T tokens, I in, O out, E experts, R total rank; r is one expert's rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...types import ExpertInput, GateRescale, GateRescaleScope, Shared

Tensors = Mapping[str, Tensor]
# (x, base output, tensors) -> one expert's output (T, O), the scale s included.
Output = Callable[[Tensor, Tensor, Tensors], Tensor]
# The gate of every token (T,), and what it weighs.
Term = tuple[Tensor, Output]


def sum_of_terms(
    terms: Sequence[Term],
    x_TI: Tensor,
    base_TO: Tensor,
    tensors: Tensors,
    gate_rescale: GateRescale = "none",
    gate_rescale_scope: GateRescaleScope = "weights",
) -> Tensor:
    """Sum of g_i E_i with the surrogate backward of `moe_lora_loop`, term by term."""
    stopped = {name: tensor.detach() for name, tensor in tensors.items()}
    out_TO = torch.zeros_like(base_TO)
    for gate_T, output in terms:
        gate_T1 = gate_T.unsqueeze(1)
        surrogate_T1 = _surrogate(gate_T1.detach(), gate_rescale)
        if gate_rescale_scope == "output":
            live_TO = output(x_TI, base_TO, tensors)
            frozen_TO = live_TO.detach()
        else:
            live_TO = output(x_TI.detach(), base_TO.detach(), tensors)
            frozen_TO = output(x_TI, base_TO, stopped)
        out_TO = out_TO + surrogate_T1 * (live_TO - live_TO.detach()) + gate_T1 * frozen_TO
    return out_TO


def _surrogate(gate: Tensor, gate_rescale: GateRescale) -> Tensor:
    if gate_rescale == "none":
        return gate
    return gate.sqrt() if gate_rescale == "sqrt" else (gate != 0).to(gate.dtype)


def lora_terms(weights_TE: Tensor, ranks: Sequence[int], scaling: float) -> list[Term]:
    """B_i A_i x, of stacked factors."""

    def output(x: Tensor, base: Tensor, tensors: Tensors, block: slice) -> Tensor:
        return scaling * x @ tensors["A"][block].T @ tensors["B"][:, block].T

    return [
        (weights_TE[:, i], functools.partial(output, block=block))
        for i, block in enumerate(_blocks(ranks))
    ]


def shared_a_terms(weights_TE: Tensor, rank: int, scaling: float) -> list[Term]:
    """B_i A x."""

    def output(x: Tensor, base: Tensor, tensors: Tensors, expert: int) -> Tensor:
        b_Or = tensors["B"][:, expert * rank : (expert + 1) * rank]
        return scaling * x @ tensors["A"].T @ b_Or.T

    return _by_expert(weights_TE, output)


def shared_b_terms(weights_TE: Tensor, rank: int, scaling: float) -> list[Term]:
    """B A_i x."""

    def output(x: Tensor, base: Tensor, tensors: Tensors, expert: int) -> Tensor:
        a_rI = tensors["A"][expert * rank : (expert + 1) * rank]
        return scaling * x @ a_rI.T @ tensors["B"].T

    return _by_expert(weights_TE, output)


def block_diagonal_terms(weights_TE: Tensor, rank: int, scaling: float) -> list[Term]:
    """B_j A_j on the j-th slice of x, which is the j-th slice of an output otherwise zero."""
    experts = weights_TE.shape[1]

    def output(x: Tensor, base: Tensor, tensors: Tensors, expert: int) -> Tensor:
        block = slice(expert * rank, (expert + 1) * rank)
        slices = list(torch.zeros_like(base).chunk(experts, 1))
        x_slice = x.chunk(experts, 1)[expert]
        slices[expert] = scaling * x_slice @ tensors["A"][block].T @ tensors["B"][:, block].T
        return torch.cat(slices, 1)

    return _by_expert(weights_TE, output)


def vector_terms(weights_TE: Tensor, scaling: float) -> list[Term]:
    """d_i * base(x)."""

    def output(x: Tensor, base: Tensor, tensors: Tensors, expert: int) -> Tensor:
        return scaling * tensors["vector"][expert] * base

    return _by_expert(weights_TE, output)


def dora_terms(
    weights_TE: Tensor, ranks: Sequence[int], scaling: float, weight_OI: Tensor
) -> list[Term]:
    """A DoRA layer's output less the base's, from the whole matrix W + s B_i A_i."""
    blocks = _blocks(ranks)

    def output(x: Tensor, base: Tensor, tensors: Tensors, expert: int) -> Tensor:
        update_OI = scaling * tensors["B"][:, blocks[expert]] @ tensors["A"][blocks[expert]]
        norm_O = (weight_OI + update_OI).detach().square().sum(1).sqrt()
        base_norm_O = weight_OI.square().sum(1).sqrt()
        ratio_O = (base_norm_O + tensors["magnitude"][expert]) / norm_O
        return (ratio_O - 1) * base + ratio_O * (x @ update_OI.T)

    return _by_expert(weights_TE, output)


def mixed_factor_terms(
    weights_TE: Tensor, rank: int, scaling: float, n_splits: int = 1
) -> list[Term]:
    """Every B_i with every A_j, on their slices: B of slice q writes there, A of slice p reads."""
    tokens, experts = weights_TE.shape
    skills = experts // n_splits
    if n_splits > 1:
        shares = weights_TE.view(tokens, n_splits, skills)
        weights_TE = (shares / shares.sum(-1, keepdim=True)).flatten(1)

    def output(x: Tensor, base: Tensor, tensors: Tensors, reads: int, writes: int) -> Tensor:
        a = tensors["A"][reads * rank : (reads + 1) * rank]
        b = tensors["B"][:, writes * rank : (writes + 1) * rank]
        slices = list(torch.zeros_like(base).chunk(n_splits, 1))
        slices[writes // skills] = scaling * x.chunk(n_splits, 1)[reads // skills] @ a.T @ b.T
        return torch.cat(slices, 1)

    return [
        (weights_TE[:, i] * weights_TE[:, j], functools.partial(output, reads=i, writes=j))
        for i in range(experts)
        for j in range(experts)
    ]


def tensor_terms(weights_TE: Tensor, rank: int, scaling: float) -> list[Term]:
    """As `mixed_factor_terms`, of rows that are Kronecker products of short vectors."""

    def rows(leaves: Tensor, width: int) -> Tensor:
        products = [
            functools.reduce(torch.kron, [leaf[row] for leaf in leaves])[:width]
            for row in range(leaves.shape[1])
        ]
        return torch.stack(products)

    def with_factors(x: Tensor, base: Tensor, tensors: Tensors, inner: Output) -> Tensor:
        a_RI = rows(tensors["leaves_A"], x.shape[1])
        b_RO = rows(tensors["leaves_B"], base.shape[1])
        return inner(x, base, {"A": a_RI, "B": b_RO.T})

    return [
        (gate_T, functools.partial(with_factors, inner=inner))
        for gate_T, inner in mixed_factor_terms(weights_TE, rank, scaling)
    ]


def pool_terms(
    weights_TE: Tensor,
    scaling: float,
    x_TI: Tensor,
    tensors: Tensors,
    top_k: int,
    condition_weight: float = 1.0,
) -> list[Term]:
    """Every b with every a, the gate zero for tokens that do not pair them; token by token."""
    experts = weights_TE.shape[1]
    gates: dict[tuple[int, int], list[Tensor]] = {
        (i, j): [] for i in range(experts) for j in range(experts)
    }
    for x_I, weights_E in zip(x_TI, weights_TE, strict=True):
        of_router = weights_E.tolist()
        order = sorted(range(experts), key=of_router.__getitem__, reverse=True)
        scores_E = torch.softmax(tensors["gate_B"] @ x_I, 0)
        if "condition" in tensors:
            for position, i in enumerate(order[:top_k]):
                said_E = tensors["A"][i] @ tensors["condition"][position]
                scores_E = scores_E + condition_weight * torch.softmax(said_E, 0)
        wanted = sorted(range(experts), key=scores_E.tolist().__getitem__, reverse=True)
        chosen = [i for i in order if of_router[i] != 0]
        pairs = dict(zip(chosen, wanted, strict=False))
        total = torch.stack([scores_E[j] for j in pairs.values()]).sum()
        for (i, j), of_tokens in gates.items():
            paired = pairs.get(i) == j
            of_tokens.append(
                weights_E[i] * scores_E[j] / total if paired else torch.zeros_like(total)
            )

    def output(x: Tensor, base: Tensor, tensors: Tensors, i: int, j: int) -> Tensor:
        return scaling * (x @ tensors["A"][i]).unsqueeze(1) * tensors["B"][:, j]

    return [
        (torch.stack(of_tokens), functools.partial(output, i=i, j=j))
        for (i, j), of_tokens in gates.items()
    ]


def tree_loop(
    inputs: ExpertInput,
    tensors: Tensors,
    weights_TE: Tensor,
    fan_outs: Sequence[int],
    rank: int,
    scaling: float,
    activation: Callable[[Tensor], Tensor],
    gate_rescale: GateRescale = "none",
    gate_rescale_scope: GateRescaleScope = "weights",
) -> Tensor:
    """S'MoRE by recursion, token by token and node by node; `fan_outs` from the leaves up."""
    stopped = {name: t if _is_gate(name) else t.detach() for name, t in tensors.items()}
    rows = []
    for x_I, weights_E in zip(inputs.x, weights_TE, strict=True):
        tree = functools.partial(
            _tree, fan_outs=fan_outs, rank=rank, scaling=scaling, activation=activation
        )
        if gate_rescale == "none":
            rows.append(tree(x_I, x_I, tensors, weights_E))
            continue
        outer = gate_rescale_scope == "output"
        true = tree(x_I.detach() if outer else x_I, x_I, stopped, weights_E)
        rescale = functools.partial(_surrogate, gate_rescale=gate_rescale)
        live = tree(
            x_I if outer else x_I.detach(),
            x_I.detach(),
            {name: t.detach() if _is_gate(name) else t for name, t in tensors.items()},
            rescale(weights_E.detach()),
            rescale=rescale,
        )
        rows.append(true + live - live.detach())
    return torch.stack(rows)


def _is_gate(name: str) -> bool:
    return name.startswith(("gate", "keys"))


def _tree(
    x_I: Tensor,
    gate_x_I: Tensor,
    tensors: Tensors,
    weights_E: Tensor,
    fan_outs: Sequence[int],
    rank: int,
    scaling: float,
    activation: Callable[[Tensor], Tensor],
    rescale: Callable[[Tensor], Tensor] = lambda gate: gate,
) -> Tensor:
    """One token's update (O,)."""

    def node(level: int, expert: int, known: Tensor) -> Tensor:
        block = slice(expert * rank, (expert + 1) * rank)
        value = tensors[f"B{level}"][:, block] @ tensors[f"A{level}"][block] @ x_I
        known = torch.cat([known, tensors[f"keys{level}"][expert]])
        if level > 0:
            below = level - 1
            query = torch.tanh(tensors[f"gate_in{below}"] @ known)
            logits = tensors[f"keys{below}"] @ tensors[f"gate_out{below}"] @ query
            chosen = torch.argsort(logits, descending=True)[: fan_outs[below]]
            shares = torch.softmax(logits[chosen], 0)
            children = torch.stack([node(below, int(child), known) for child in chosen])
            value = value + tensors[f"W{level}"] @ (rescale(shares) @ children)
        return activation(value)

    down = tensors["gate_down"] @ gate_x_I
    top = torch.stack([node(len(fan_outs), e, down) for e in range(len(weights_E))])
    mixed: Tensor = tensors["final"] @ (weights_E @ top)
    return scaling * mixed


def precondition_shared_loop(
    a: Tensor,
    b: Tensor,
    grad_a: Tensor,
    grad_b: Tensor,
    experts: int,
    shared: Shared,
    damping: float,
) -> tuple[Tensor, Tensor]:
    """As `precondition_loop`, where the experts share A or B.

    With one A, X = [s B_1 A; s B_2 A; ...] is one map to all experts' outputs, so A's metric is the
    sum of theirs; each B_i has the one of A. With one B the other way round.
    """
    if shared == "b":
        new_b, new_a = precondition_shared_loop(b.T, a.T, grad_b.T, grad_a.T, experts, "a", damping)
        return new_a.T, new_b.T
    rank = a.shape[0]
    eye = torch.eye(rank, dtype=a.dtype)
    metric = sum((b_Or.T @ b_Or for b_Or in b.split(rank, 1)), torch.zeros_like(eye))
    inverse = torch.linalg.inv(a @ a.T + damping * eye)
    new_b = torch.cat([grad_Or @ inverse for grad_Or in grad_b.split(rank, 1)], 1)
    assert len(b.split(rank, 1)) == experts
    return torch.linalg.inv(metric + damping * eye) @ grad_a, new_b


def _by_expert(weights_TE: Tensor, output: Callable[..., Tensor]) -> list[Term]:
    return [
        (weights_TE[:, expert], functools.partial(output, expert=expert))
        for expert in range(weights_TE.shape[1])
    ]


def _blocks(ranks: Sequence[int]) -> list[slice]:
    starts = [sum(ranks[:i]) for i in range(len(ranks))]
    return [slice(start, start + rank) for start, rank in zip(starts, ranks, strict=True)]
