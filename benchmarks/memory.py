"""What one adapted layer keeps for its backward, and the peak of its forward and backward.

    python benchmarks/memory.py

The layer of `layer.py` at 2048 tokens. Kept is every storage that autograd saves, once, without
parameters. The peak is above what lies in memory before the forward: on a CPU from the profiler's
record of every allocation, which is exact and the same in every run; on a GPU from the allocator.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from report import main
from subjects import EXPERTS, RANK, Base, adapted, forward_backward, layer_input, lora, mixture
from timing import Comparison, Ratio, Result, Settings
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

TOKENS = 2048
LORA = f"LoRA r {EXPERTS * RANK}"


def measure(settings: Settings, tokens: int = TOKENS, width: int = 2048) -> Result:
    """Bytes, with and without dropout; the base alone for comparison."""
    base = Base(width).to(settings.device, settings.dtype)
    x, upstream = layer_input(tokens, settings, width)
    result = Result()

    def figures(name: str, layer: nn.Module) -> tuple[float, float]:
        settings.say(name)
        layer.train()
        saved = saved_bytes(layer, x, settings)
        peak = peak_bytes(forward_backward(layer, x, upstream, settings), settings.device)
        result.medians |= {f"{name}: saved, MB": saved / 1e6, f"{name}: peak, MB": peak / 1e6}
        return saved, peak

    figures("base", base)
    for dropout in (0.0, 0.05):
        tail = f", dropout {dropout}" if dropout else ""
        ours = figures(
            "moelora" + tail,
            adapted(base, mixture(["linear"], gate_rescale="sqrt", lora_dropout=dropout), settings),
        )
        theirs = figures(
            LORA + tail, adapted(base, lora(["linear"], lora_dropout=dropout), settings)
        )
        for what, mine, other in zip(("saved", "peak"), ours, theirs, strict=True):
            ratio = mine / other
            result.comparisons.append(
                Comparison(
                    f"{what}, {tokens} tokens{tail}",
                    f"{mine / 1e6:.2f} MB",
                    LORA,
                    f"{other / 1e6:.2f} MB",
                    Ratio(ratio, ratio, ratio),
                    at_most=1.05,
                )
            )
    return result


def saved_bytes(layer: nn.Module, x: Tensor, settings: Settings) -> int:
    """Bytes of the distinct storages that a forward saves, without the layer's parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}
    alive = []  # a freed storage's address might come back

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), settings.autocast():
        layer(x)
    return sum(kept.values())


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most bytes that are in use at once during a call, above those in use before it."""
    call()  # what only a first call allocates
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # some builds of torch print every start
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    used = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        used += event["args"]["Bytes"]
        peak = max(peak, used)
    return peak


if __name__ == "__main__":
    main(measure, __file__, __doc__)
