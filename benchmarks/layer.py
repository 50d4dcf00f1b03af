"""Time of one adapted layer, forward and backward, the base's own time taken off.

    python benchmarks/layer.py [--tokens 512 1024] [--rounds 60] [--quick]

A linear 2048 wide with our mixture (20 experts of rank 4, 10 selected) beside PEFT's LoRA of the
same total rank, which is the limit, and the two ways in which published code computes a mixture:
a loop over the experts, and an einsum over stacked experts with one output for each of them.
MoE-PEFT runs in an environment of its own (`moepeft.py`), PEFT's X-LoRA needs a whole model
(`step.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from report import run
from subjects import (
    EXPERTS,
    RANK,
    TOP_K,
    WIDTH,
    Base,
    adapted,
    forward_backward,
    layer_input,
    lora,
    mixture,
)
from timing import Result, Settings, interleave, parser
from torch import Tensor, nn

from moelora_plugin.ops.reference import moe_lora_loop

SIZES = (512, 1024, 2048, 4096)
LORA = f"LoRA r {EXPERTS * RANK}"


class Published(nn.Module):
    """A mixture with its gates as published code computes them; how they mix is left open."""

    def __init__(self, base: Base, settings: Settings, width: int = WIDTH) -> None:
        super().__init__()
        self.base = base
        self.gate = nn.Linear(width, EXPERTS, bias=False, device=settings.device)
        self.a = nn.Parameter(torch.randn(EXPERTS * RANK, width, device=settings.device) / width)
        self.b = nn.Parameter(torch.randn(width, EXPERTS * RANK, device=settings.device) / width)

    def gates(self, x_TI: Tensor) -> Tensor:
        """Top-k of the softmax, renormalised: (T, E)."""
        top, index = self.gate(x_TI).softmax(-1).topk(TOP_K)
        top = top / top.sum(-1, keepdim=True)
        return torch.zeros(len(x_TI), EXPERTS, device=x_TI.device, dtype=top.dtype).scatter(
            -1, index, top
        )


class Loop(Published):
    """A loop over the experts, with the surrogate of gate rescaling spelled out."""

    def forward(self, x: Tensor) -> Tensor:
        """Base plus update."""
        x_TI = x.flatten(0, -2)
        update = moe_lora_loop(
            x_TI, self.a, self.b, self.gates(x_TI), [RANK] * EXPERTS, 1.0, "sqrt", "output"
        )
        return self.base(x) + update.view_as(x)


class Stacked(Published):
    """Every expert's output at once, then their weighted sum. Suffixes: r rank of one, O out."""

    def forward(self, x: Tensor) -> Tensor:
        """Base plus update."""
        x_TI = x.flatten(0, -2)
        z_TEr = torch.einsum("ti,eri->ter", x_TI, self.a.unflatten(0, (EXPERTS, RANK)))
        y_TEO = torch.einsum("ter,oer->teo", z_TEr, self.b.unflatten(1, (EXPERTS, RANK)))
        update = torch.einsum("teo,te->to", y_TEO, self.gates(x_TI))
        return self.base(x) + update.view_as(x)


def measure(settings: Settings, sizes: Sequence[int] = (), width: int = WIDTH) -> Result:
    """Adapter part of forward and backward for each number of tokens."""
    base = Base(width).to(settings.device, settings.dtype)
    layers = {
        "base": base,
        "moelora": adapted(base, mixture(["linear"], gate_rescale="sqrt"), settings),
        LORA: adapted(base, lora(["linear"]), settings),
        "loop over experts": Loop(base, settings, width),
        "einsum over stacked experts": Stacked(base, settings, width),
    }
    result = Result()
    for tokens in sizes or (SIZES[:1] if settings.quick else SIZES):
        x, upstream = layer_input(tokens, settings, width)
        calls = {
            name: forward_backward(layer, x, upstream, settings) for name, layer in layers.items()
        }
        times = interleave(
            calls,
            settings,
            seldom=("loop over experts", "einsum over stacked experts"),
            label=f"{tokens} tokens",
        )
        what = f"{tokens} tokens"
        result.add(what, times)
        result.comparisons += [
            times.compare(what, "moelora", LORA, "base", at_most=1.15),
            times.compare(
                what, "moelora", "loop over experts", "base", theirs_over_ours=True, at_least=10
            ),
            times.compare(
                what, "moelora", "einsum over stacked experts", "base", theirs_over_ours=True
            ),
        ]
    return result


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, nargs="+", default=[])
    parsed = options.parse_args()
    run({"layer": functools.partial(measure, sizes=parsed.tokens)}, parsed)
