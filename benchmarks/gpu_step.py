"""Tokens a second of a training step of a 1.1 billion parameter Llama on a GPU, random weights.

    python benchmarks/gpu_step.py --device cuda --dtype bfloat16

Adapters on all linears of the decoder layers: our mixture of 20 experts of rank 4 beside PEFT's
LoRA of the same total rank, both with torch's fused AdamW. The share of peak is that of the
operations the step needs (two for each base weight and token in the forward, two in the backward,
six for each adapter weight; attention not counted) over what a large matrix product reaches on
the same device in the same dtype.
"""

from __future__ import annotations

import torch
from report import main
from step import adamw, step
from subjects import EXPERTS, RANK, adapted, lora, mixture
from timing import Comparison, Result, Settings, Times, clock, interleave
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

BATCH, LENGTH = 8, 1024
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = f"LoRA r {EXPERTS * RANK}"
# TinyLlama's shape.
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}


def measure(
    settings: Settings, shape: dict[str, int] = SHAPE, batch: int = BATCH, length: int = LENGTH
) -> Result:
    """The step with both adapters."""
    if settings.device != "cuda":
        return Result(left_out={"gpu_step": "needs --device cuda"})
    return steps(settings, shape, batch, length)


def steps(settings: Settings, shape: dict[str, int], batch: int, length: int) -> Result:
    """What `measure` does where there is a GPU."""
    torch.manual_seed(0)
    with torch.device(settings.device):
        base = LlamaForCausalLM(LlamaConfig(**shape)).to(settings.dtype).requires_grad_(False)
    tokens = torch.randint(shape["vocab_size"], (batch, length), device=settings.device)
    models = {
        "moelora": adapted(base, mixture(LINEARS), settings),
        LORA: adapted(base, lora(LINEARS), settings),
    }
    times = interleave(
        {name: step(model, adamw(model), tokens, settings) for name, model in models.items()},
        settings,
        label=f"{batch} x {length} tokens",
    )
    result = Result()
    what = f"{batch} x {length} tokens"
    result.add(what, times)
    peak = product_rate(settings)
    result.medians["product of 8192 x 8192, TFLOP/s"] = peak / 1e12
    for name, model in models.items():
        share = operations(base, model) * tokens.numel() / times.median(name) / peak
        result.medians[f"{what}: {name}, share of that"] = share
    result.comparisons.append(_row(what, times, tokens.numel()))
    return result


def operations(base: nn.Module, model: nn.Module) -> float:
    """Operations per token of a training step with an adapter."""
    embedding = base.get_input_embeddings().weight.numel()
    frozen = sum(parameter.numel() for parameter in base.parameters()) - embedding
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return 4.0 * frozen + 6.0 * trained


def product_rate(settings: Settings, size: int = 8192) -> float:
    """Operations a second of one large matrix product."""
    a, b = (torch.randn(size, size, device=settings.device, dtype=settings.dtype) for _ in range(2))
    seconds = min(clock(lambda: a @ b, settings.device) for _ in range(5))
    return 2.0 * size**3 / seconds


def _row(what: str, times: Times, tokens: int) -> Comparison:
    speeds = [f"{tokens / times.median(name):,.0f} tokens/s" for name in ("moelora", LORA)]
    return Comparison(what, speeds[0], LORA, speeds[1], times.ratio("moelora", LORA), at_most=1.05)


if __name__ == "__main__":
    main(measure, __file__, __doc__)
