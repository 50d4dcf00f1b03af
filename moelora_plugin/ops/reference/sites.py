"""Mixtures of whole feed-forward blocks, and of a layer's modules, token by token.

Shape suffixes: T tokens, H features in and out, I in, O out, E experts; r is one expert's rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...types import GateRescale, GateRescaleScope
from .mixture import _surrogate

# (a linear by its name and input, x) -> the block's output for one token.
Linear = Callable[[str, Tensor], Tensor]
FeedForward = Callable[[Linear, Tensor], Tensor]


@dataclass(frozen=True)
class ReferenceLinear:
    """A linear with experts, or without.

    Attributes:
        weight_OI: the base's weight.
        bias_O: its bias.
        experts: (A_i (r, I), B_i (O, r)) of each; none where it is not adapted.
        scaling: LoRA scale s.
    """

    weight_OI: Tensor
    bias_O: Tensor | None = None
    experts: Sequence[tuple[Tensor, Tensor]] = ()
    scaling: float = 1.0

    def __call__(self, x_I: Tensor, expert: int, stop: bool = False) -> Tensor:
        """Base and one expert for one token; `stop` detaches A and B."""
        y_O = self.weight_OI @ x_I
        if self.bias_O is not None:
            y_O = y_O + self.bias_O
        if not self.experts:
            return y_O
        a_rI, b_Or = self.experts[expert]
        if stop:
            a_rI, b_Or = a_rI.detach(), b_Or.detach()
        return y_O + self.scaling * (b_Or @ (a_rI @ x_I))


def block_loop(
    feed_forward: FeedForward,
    linears: Mapping[str, ReferenceLinear],
    x_TH: Tensor,
    weights_TE: Tensor,
    gate_rescale: GateRescale = "none",
    gate_rescale_scope: GateRescaleScope = "weights",
) -> Tensor:
    """Sum over experts of g_i FFN_i(x) for every token     (MixLoRA, arXiv 2404.15159).

    The surrogate backward is spelled out by detaching, as in `moe_lora_loop`: A_i and B_i see
    c_i = g_i^p; with scope "output" all of x's gradient does, with "weights" none.

    Args:
        feed_forward: the block written with its linears as functions.
        linears: those, by name.
        x_TH: the block's input (T, H).
        weights_TE: gates (T, E), zero where not selected.
        gate_rescale: "none" (p = 1), "sqrt" (p = 1/2) or "exact" (p = 0 on selected experts).
        gate_rescale_scope: "weights" or "output".

    Returns:
        (T, H); zero for a token without experts.
    """
    rows = []
    for x_H, weights_E in zip(x_TH, weights_TE, strict=True):
        y_H = torch.zeros_like(x_H)
        for expert, gate in enumerate(weights_E):
            if gate == 0:
                continue

            def run(x_H: Tensor, stop: bool, expert: int = expert) -> Tensor:
                return feed_forward(lambda name, h: linears[name](h, expert, stop), x_H)

            surrogate = _surrogate(gate.detach(), gate_rescale)
            if gate_rescale_scope == "output":
                live_H = run(x_H, stop=False)
                y_H = y_H + surrogate * live_H + (gate - surrogate) * live_H.detach()
            else:
                live_H = run(x_H.detach(), stop=False)
                y_H = y_H + surrogate * (live_H - live_H.detach()) + gate * run(x_H, stop=True)
        rows.append(y_H)
    return torch.stack(rows)


def gated_linear_loop(linear: ReferenceLinear, x_TI: Tensor, gates_T: Tensor) -> Tensor:
    """Base(x) + g s B A x for every token: one expert with a gate from elsewhere (T, O)."""
    rows = []
    for x_I, gate in zip(x_TI, gates_T, strict=True):
        base_O = ReferenceLinear(linear.weight_OI, linear.bias_O)(x_I, 0)
        rows.append(base_O + gate * (linear(x_I, 0) - base_O))
    return torch.stack(rows)
