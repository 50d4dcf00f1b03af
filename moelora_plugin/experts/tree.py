"""A tree of residual experts: each selected expert selects its children.

Shape suffixes: T tokens, I in, O out, E experts of the top, S experts of one sub-layer, N nodes
of one, P paths from the top down to a sub-layer's parents, F children of a parent, G gate width, D
width of a sub-layer's output; r is one expert's rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..ops.gate_rescale import rescaled_mixture
from ..types import ExpertInput, Gates, LayerPlan
from .base import ExpertKind, Tensors

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "identity": lambda values: values,
}
_MAX_LEVELS = 64


class TreeExperts(ExpertKind):
    """S'MoRE (arXiv 2504.06426): residuals of several orders, mixed along a tree.

    Sub-layer 0 holds the leaves, the last one the top. Expert e of sub-layer l has A_{l,e} (r, I)
    and B_{l,e} (D_{l+1}, r). A node on a path gives

        v = f(B_{l,e} A_{l,e} x + W_l sum_c g_c v_c)          c: the children that it selected
        update = s W_final sum_e g_e v_e                      e: the top

    with no sum at the leaves, activation f, widths D_0 = 0 and D_{l+1} = D_l + S_l r, and W_final
    zero at first. The layer's router selects at the top. Below it every parent selects `fan_out`
    children by softmax, renormalised, of a key-query gate:

        logits = keys_l U_l tanh(V_l [down x ; keys of the ancestors])

    so a child's gate depends on the path that leads to it.

    Covered: the default of the published code (gate "switch" with a multi-layer perceptron,
    activation at every node, final projection zero) without its bias vectors. Not covered: biases,
    the noisy top-k and dense gates below the top, the balance loss of those gates (`aux_losses`
    see the top's routing only), ranks and gate widths that differ between sub-layers, one pool of
    experts for all sub-layers, learned activations. All experts of the top are evaluated, whether
    selected or not; below, the selected ones.

    Gate rescaling: the gradient that the tree would give, gated by g^p, at its own activations.
    Riemannian metric: not defined, since an expert's factors act through W and f; no merging.

    Args:
        plan: the experts of the top, all of one rank, which all sub-layers have.
        in_features: I.
        out_features: O.
        children: number of experts of each sub-layer below the top, nearest first; one number for
            a single sub-layer.
        fan_out: children that a parent selects, as many numbers.
        activation: "tanh", "relu" or "identity".
        gate_width: G.

    Raises:
        ConfigError: numbers that do not fit each other, or an unknown activation.
    """

    def __init__(
        self,
        plan: LayerPlan,
        in_features: int,
        out_features: int,
        *,
        children: int | list[int] = 4,
        fan_out: int | list[int] = 2,
        activation: str = "tanh",
        gate_width: int = 32,
    ) -> None:
        super().__init__(plan, in_features, out_features)
        self.rank = self.uniform_rank()
        below = [children] if isinstance(children, int) else list(children)
        fans = [fan_out] if isinstance(fan_out, int) else list(fan_out)
        if len(below) != len(fans) or not below:
            raise ConfigError(
                f"expert_kwargs['children']={children!r} and ['fan_out']={fan_out!r} must hold one "
                "number for each sub-layer below the top."
            )
        if len(below) > _MAX_LEVELS:
            raise ConfigError(
                f"expert_kwargs['children'] has {len(below)} sub-layers, which must not be more "
                f"than {_MAX_LEVELS}."
            )
        for count, fan in zip(below, fans, strict=True):
            if not 1 <= fan <= count:
                raise ConfigError(
                    f"expert_kwargs['fan_out'] holds {fan}, which must be from 1 to the number of "
                    f"experts {count} in ['children']."
                )
        if activation not in _ACTIVATIONS:
            raise ConfigError(
                f"expert_kwargs['activation']={activation!r} must be one of "
                f"{', '.join(_ACTIVATIONS)}."
            )
        if gate_width < 1:
            raise ConfigError(f"expert_kwargs['gate_width']={gate_width!r} must be at least 1.")
        # From the leaves to the top, as the formulas count.
        self.sizes = [*reversed(below), plan.num_experts]
        self.fan_outs = fans[::-1]
        self.activation = activation
        self.gate_width = gate_width
        self.widths = [0]
        for size in self.sizes:
            self.widths.append(self.widths[-1] + size * self.rank)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By sub-layer l: A{l} (S r, I), B{l} (D, S r), W{l}, keys{l}, gates; and final (O, D)."""
        shapes: dict[str, tuple[int, ...]] = {"gate_down": (self.gate_width, self.in_features)}
        top = len(self.sizes) - 1
        for level, size in enumerate(self.sizes):
            shapes[f"A{level}"] = (size * self.rank, self.in_features)
            shapes[f"B{level}"] = (self.widths[level + 1], size * self.rank)
            if level > 0:
                shapes[f"W{level}"] = (self.widths[level + 1], self.widths[level])
            shapes[f"keys{level}"] = (size, self.gate_width)
            if level < top:
                known = self.gate_width * (1 + top - level)
                shapes[f"gate_in{level}"] = (self.gate_width, known)
                shapes[f"gate_out{level}"] = (self.gate_width, self.gate_width)
        shapes["final"] = (self.out_features, self.widths[-1])
        return shapes

    def reset(self, tensors: Tensors) -> None:
        """Every matrix as torch.nn.Linear draws it, each B for its own r inputs; final zero."""
        for name, tensor in tensors.items():
            if name == "final":
                nn.init.zeros_(tensor)
            elif name.startswith("B"):
                nn.init.uniform_(tensor, -1 / math.sqrt(self.rank), 1 / math.sqrt(self.rank))
            else:
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))

    def update(self, tensors: Tensors, inputs: ExpertInput, gates: Gates) -> Tensor:
        """From the top down the paths are selected, from the leaves up they are evaluated."""
        ids, shares = self._select(tensors, inputs.x)
        experts = {name: t for name, t in tensors.items() if not name.startswith(("gate", "keys"))}

        def mixture(inputs: ExpertInput, tensors: Tensors, weights: list[Tensor]) -> Tensor:
            return self._evaluate(tensors, inputs.x, ids, weights)

        return rescaled_mixture(mixture, inputs, experts, gates, shares) * gates.scaling

    def _select(self, tensors: Tensors, x_TI: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """For each sub-layer below the top, from the leaves: ids and gates (T, P, F)."""
        known_TG = torch.nn.functional.linear(x_TI, tensors["gate_down"])
        keys_EG = tensors[f"keys{len(self.fan_outs)}"].to(known_TG.dtype)
        known_TPG = _beside(known_TG.unsqueeze(1), keys_EG.expand(len(x_TI), 1, -1, -1))
        ids, shares = [], []
        for level in reversed(range(len(self.fan_outs))):
            query = torch.tanh(torch.nn.functional.linear(known_TPG, tensors[f"gate_in{level}"]))
            query = torch.nn.functional.linear(query, tensors[f"gate_out{level}"])
            logits_TPS = torch.nn.functional.linear(query, tensors[f"keys{level}"])
            wide = torch.promote_types(logits_TPS.dtype, torch.float32)
            probs_TPF, ids_TPF = torch.softmax(logits_TPS, -1, dtype=wide).topk(
                self.fan_outs[level], -1
            )
            ids.append(ids_TPF)
            shares.append(probs_TPF / probs_TPF.sum(-1, keepdim=True))
            if level:
                keys_SG = tensors[f"keys{level}"].to(known_TPG.dtype)
                known_TPG = _beside(known_TPG, keys_SG[ids_TPF])
        return ids[::-1], shares[::-1]

    def _evaluate(
        self, tensors: Tensors, x_TI: Tensor, ids: list[Tensor], weights: list[Tensor]
    ) -> Tensor:
        """The update before s (T, O); `weights`: the top's gates, then those of the leaves up."""
        below_TPD: Tensor | None = None
        for level, (ids_TPF, shares_TPF) in enumerate(zip(ids, weights[1:], strict=True)):
            own_TSD = self._own(tensors, x_TI, level)
            index = ids_TPF.flatten(1).unsqueeze(-1).expand(-1, -1, own_TSD.shape[-1])
            node_TND = self._node(tensors, own_TSD.gather(1, index), below_TPD, level)
            node_TPFD = node_TND.unflatten(1, ids_TPF.shape[1:])
            below_TPD = (node_TPFD * shares_TPF.to(node_TPFD.dtype).unsqueeze(-1)).sum(2)
        top = len(ids)
        node_TED = self._node(tensors, self._own(tensors, x_TI, top), below_TPD, top)
        mixed_TD = (node_TED * weights[0].to(node_TED.dtype).unsqueeze(-1)).sum(1)
        return torch.nn.functional.linear(mixed_TD, tensors["final"])

    def _own(self, tensors: Tensors, x_TI: Tensor, level: int) -> Tensor:
        """B A x of each expert of a sub-layer (T, S, D)."""
        z_TSr = torch.nn.functional.linear(x_TI, tensors[f"A{level}"]).unflatten(
            -1, (-1, self.rank)
        )
        b_DSr = tensors[f"B{level}"].unflatten(-1, (-1, self.rank))
        return torch.einsum("tsr,dsr->tsd", z_TSr, b_DSr)

    def _node(
        self, tensors: Tensors, own_TND: Tensor, below_TND: Tensor | None, level: int
    ) -> Tensor:
        """f(B A x + W (what the children give)) of N nodes."""
        if below_TND is not None:
            below = torch.nn.functional.linear(below_TND, tensors[f"W{level}"])
            own_TND = own_TND + below
        return _ACTIVATIONS[self.activation](own_TND)


def _beside(known_TPG: Tensor, keys_TPFG: Tensor) -> Tensor:
    """What a gate knows on each path, with the key of each child on it: (T, P F, 2 G)."""
    known = known_TPG.unsqueeze(2).expand(-1, -1, keys_TPFG.shape[2], -1)
    return torch.cat([known, keys_TPFG], -1).flatten(1, 2)
