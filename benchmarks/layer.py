"""Time of one adapted layer, forward and backward, the base's own time subtracted.

    python benchmarks/layer.py [--tokens 512] [--width 2048] [--repeats 60] [--json FILE]

Side by side in one process, interleaved, medians: our layer at n/k/r = 20/10/4, PEFT's LoRA of the
same total rank (the limit), and one Python loop over the experts as published implementations have
it. Ratios are what counts; the times are this machine's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from moelora_plugin import MoeLoraConfig
from moelora_plugin.ops.reference import moe_lora_loop

EXPERTS, TOP_K, RANK = 20, 10, 4


class Base(nn.Module):
    """A frozen linear, as in the middle of a model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map through the frozen weight."""
        return self.linear(x)


def candidates(width: int) -> dict[str, nn.Module | Callable[[torch.Tensor], torch.Tensor]]:
    """The layers to time, by name; "base" is what is subtracted."""
    torch.manual_seed(0)
    ours = get_peft_model(
        Base(width),
        MoeLoraConfig(
            r=RANK,
            num_experts=EXPERTS,
            top_k=TOP_K,
            lora_dropout=0.0,
            target_modules=["linear"],
            gate_rescale="sqrt",
        ),
    )
    lora = get_peft_model(
        Base(width),
        LoraConfig(r=EXPERTS * RANK, lora_alpha=EXPERTS * RANK, target_modules=["linear"]),
    )
    layer = ours.base_model.model.linear

    def loop(x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)
        gates = layer.route(flat, "default").weights
        return layer.base_layer(x) + moe_lora_loop(
            flat,
            layer.moelora_A["default"].weight,
            layer.moelora_B["default"].weight,
            gates,
            layer.moelora_mixture["default"].plan.ranks,
            layer.moelora_mixture["default"].scaling,
            "sqrt",
            "output",
        ).view_as(x)

    return {"base": Base(width), "moelora": ours, "lora": lora, "loop": loop}


def measure(tokens: int, width: int, repeats: int) -> dict[str, float]:
    """Median seconds of forward plus backward for each candidate, interleaved."""
    layers = candidates(width)
    x = torch.randn(4, tokens // 4, width, requires_grad=True)
    upstream = torch.randn(4, tokens // 4, width)
    times: dict[str, list[float]] = {name: [] for name in layers}
    for repeat in track(range(repeats + 3), description="timing", console=Console(stderr=True)):
        for name, layer in layers.items():
            x.grad = None
            start = time.perf_counter()
            layer(x).backward(upstream)
            if repeat >= 3:  # the first rounds warm caches and the allocator
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print the two ratios, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    medians = measure(options.tokens, options.width, options.repeats)
    adapter = {name: value - medians["base"] for name, value in medians.items() if name != "base"}
    ratios = {
        "moelora / lora": adapter["moelora"] / adapter["lora"],
        "loop / moelora": adapter["loop"] / adapter["moelora"],
    }
    table = Table(
        title=f"{EXPERTS}/{TOP_K}/{RANK}, {options.tokens} tokens, width {options.width}, fp32, "
        f"{options.threads} threads: forward + backward"
    )
    for column in ("", "median ms", "adapter part ms"):
        table.add_column(column, justify="left" if not column else "right")
    for name, value in medians.items():
        part = f"{1e3 * adapter[name]:.2f}" if name in adapter else ""
        table.add_row(name, f"{1e3 * value:.2f}", part)
    for name, value in ratios.items():
        table.add_row(name, "", f"{value:.2f} x")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"medians": medians, "ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
