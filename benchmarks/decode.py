"""Tokens a second of SmolLM2-135M with a cache, one sequence, greedy.

    python benchmarks/decode.py

Adapters on q, k, v and o: our mixture of 20 experts of rank 4 beside PEFT's LoRA of the same total
rank and the bare base. The figure is ours over LoRA's tokens a second.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from report import main
from subjects import ATTENTION, EXPERTS, RANK, adapted, load_smollm2, lora, mixture
from timing import Comparison, Result, Settings, Times, interleave
from torch import nn

PROMPT, NEW = 32, 64
LORA = f"LoRA r {EXPERTS * RANK}"


def measure(settings: Settings, base: nn.Module | None = None, new: int = NEW) -> Result:
    """Tokens a second; `base` is another language model to do it with."""
    base = load_smollm2(settings) if base is None else base
    torch.manual_seed(3)
    prompt = torch.randint(base.config.vocab_size, (1, PROMPT), device=settings.device)
    models = {
        "base": base,
        "moelora": adapted(base, mixture(ATTENTION), settings),
        LORA: adapted(base, lora(ATTENTION), settings),
    }
    new = new // 4 if settings.quick else new
    times = interleave(
        {name: decoding(model, prompt, new) for name, model in models.items()},
        settings,
        label=f"{new} tokens",
    )
    result = Result()
    result.add(f"{PROMPT} + {new} tokens", times)
    result.comparisons = [
        _row(times, new, LORA, at_least=0.95),
        _row(times, new, "base"),
    ]
    return result


def decoding(model: nn.Module, prompt: torch.Tensor, new: int) -> Callable[[], None]:
    """Generation of exactly `new` tokens."""
    model.eval()
    mask = torch.ones_like(prompt)

    def call() -> None:
        with torch.inference_mode():
            model.generate(
                input_ids=prompt,
                attention_mask=mask,
                min_new_tokens=new,
                max_new_tokens=new,
                do_sample=False,
                use_cache=True,
            )

    return call


def _row(times: Times, new: int, other: str, **target: float) -> Comparison:
    speeds = [f"{new / times.median(name):.1f} tokens/s" for name in ("moelora", other)]
    # The other's seconds over ours are our tokens a second over the other's.
    return Comparison(
        f"{new} tokens, batch 1",
        speeds[0],
        other,
        speeds[1],
        times.ratio(other, "moelora"),
        **target,
    )


if __name__ == "__main__":
    main(measure, __file__, __doc__)
