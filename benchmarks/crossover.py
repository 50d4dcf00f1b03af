"""Whether the rule picks the faster of the dense and the grouped path.

    python benchmarks/crossover.py --threads 1

For several sizes and numbers of experts: the path that `ops.grouped.prefers_grouped` picks over the
other one, forward and backward with the router (a softmax, top k), the base's own product left out.
The rule's constants are fitted to what this gives with one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from report import main
from timing import Result, Settings, interleave
from torch import Tensor

from moelora_plugin.ops.grouped import grouped_experts, prefers_grouped
from moelora_plugin.ops.rank_gated import mix, project
from moelora_plugin.types import Gates


class Size(NamedTuple):
    """Of a layer and its input."""

    tokens: int
    width: int
    top_k: int
    rank: int


SIZES = (
    Size(2048, 2048, 2, 16),
    Size(2048, 2048, 4, 8),
    Size(512, 2048, 2, 16),
    Size(512, 2048, 2, 4),
    Size(512, 576, 2, 8),
    Size(64, 2048, 2, 16),
)
SIZES_QUICK = SIZES[2:4]
EXPERTS = (4, 8, 16, 32, 64)
# How much slower than the other the picked path may be near the crossover, where the model of a few
# constants errs on the dense side.
WORST = 1.6


def measure(settings: Settings) -> Result:
    """The picked path over the other, for each size and number of experts."""
    result = Result()
    for size in SIZES_QUICK if settings.quick else SIZES:
        what = f"{size.tokens} tokens, {size.width} wide, k {size.top_k}, r {size.rank}"
        calls: dict[str, Callable[[], None]] = {}
        for experts in EXPERTS:
            calls |= both_paths(size, experts, settings)
        times = interleave(calls, settings, label=what)
        result.add(what, times)
        for experts in EXPERTS:
            picked, other = f"grouped, {experts}", f"dense, {experts}"
            sizes = (size.tokens, experts, size.top_k, size.rank, size.width)
            if not prefers_grouped(*sizes, settings.device):
                picked, other = other, picked
            row = f"{what}, {experts} experts: {picked.split(',')[0]}"
            result.comparisons.append(times.compare(row, picked, other, at_most=WORST))
    return result


def both_paths(size: Size, experts: int, settings: Settings) -> dict[str, Callable[[], None]]:
    """Forward and backward of one layer on either path, by name."""
    torch.manual_seed(0)
    tokens, width, top_k, rank = size

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=settings.device, dtype=settings.dtype)

    x, base, upstream = (draw(tokens, width) for _ in range(3))
    factors = [draw(experts * rank, width), draw(width, experts * rank), draw(experts, width)]
    leaves = [tensor.requires_grad_() for tensor in (x, *factors)]
    a, b, gate = leaves[1:]

    def gates(logits: Tensor) -> Gates:
        probs = torch.softmax(logits, -1, dtype=torch.float32)
        ids = probs.topk(top_k, -1).indices
        weights = torch.zeros_like(probs).scatter(-1, ids, probs.gather(-1, ids))
        return Gates(weights, 2.0, "sqrt")

    def dense() -> Tensor:
        projection = project(x, a, gate)
        assert projection.logits is not None
        return mix(projection, b, gates(projection.logits), onto_TO=base)

    def grouped() -> Tensor:
        logits = torch.nn.functional.linear(x, gate)
        return grouped_experts(x, a, b, gates(logits), base)

    def call(path: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            path().backward(upstream)
            for leaf in leaves:
                leaf.grad = None

        return run

    return {f"dense, {experts}": call(dense), f"grouped, {experts}": call(grouped)}


if __name__ == "__main__":
    main(measure, __file__, __doc__)
