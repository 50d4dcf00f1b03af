"""Time of a training step of SmolLM2-135M: forward, backward, optimizer.

    python benchmarks/step.py [--rounds 10]

Adapters on q, k, v and o, 8 sequences of 64 tokens. Our mixture of 20 experts of rank 4 beside
PEFT's LoRA of the same total rank, both with torch's fused AdamW, which compares the adapters; and
once more ours with gRAdamW. X-LoRA decides for the whole model and so cannot be timed by the layer:
here the preset `xlora` stands beside PEFT's, 20 frozen adapters of rank 4 each, of which both train
the router only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import XLoraConfig, get_peft_model
from report import main
from subjects import ATTENTION, EXPERTS, RANK, adapted, load_smollm2, lora, mixture
from timing import Result, Settings, interleave
from torch import nn

from moelora_plugin import MoeLoraConfig
from moelora_plugin.optim import build_optimizer

BATCH, LENGTH = 8, 64
LORA = f"LoRA r {EXPERTS * RANK}, AdamW"


def measure(
    settings: Settings, base: nn.Module | None = None, batch: int = BATCH, length: int = LENGTH
) -> Result:
    """Both pairs; `base` is another language model to do it with."""
    base = load_smollm2(settings) if base is None else base
    batch = batch // 4 if settings.quick else batch
    base.requires_grad_(False)
    torch.manual_seed(2)
    tokens = torch.randint(base.config.vocab_size, (batch, length), device=settings.device)
    result = Result()

    ours = adapted(base, mixture(ATTENTION, gate_rescale="none"), settings)
    riemannian = adapted(base, mixture(ATTENTION, gate_rescale="sqrt"), settings)
    plain = adapted(base, lora(ATTENTION), settings)
    times = interleave(
        {
            "moelora, AdamW": step(ours, adamw(ours), tokens, settings),
            "moelora, gRAdamW": step(
                riemannian, build_optimizer(riemannian, "gradamw", lr=1e-5), tokens, settings
            ),
            LORA: step(plain, adamw(plain), tokens, settings),
        },
        settings,
        label="step",
    )
    what = f"{batch} x {length} tokens"
    result.add(what, times)
    result.comparisons += [
        times.compare(what, "moelora, AdamW", LORA, at_most=1.05),
        times.compare(f"{what}, gRAdamW", "moelora, gRAdamW", LORA, at_most=1.05),
    ]
    del ours, riemannian, plain

    if settings.quick:
        result.left_out["X-LoRA"] = "not part of --quick"
        return result
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = xloras(base, Path(folder), settings)
        times = interleave(
            {
                "moelora, xlora": step(ours, adamw(ours), tokens, settings),
                "PEFT X-LoRA": step(theirs, adamw(theirs), tokens, settings),
            },
            settings,
            label="X-LoRA",
        )
    what = f"X-LoRA, {batch} x {length} tokens"
    result.add(what, times)
    result.comparisons.append(
        times.compare(what, "moelora, xlora", "PEFT X-LoRA", theirs_over_ours=True)
    )
    return result


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Torch's fused AdamW over what trains."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-5, fused=True)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, settings: Settings
) -> Callable[[], None]:
    """One training step on always the same tokens."""
    model.train()

    def call() -> None:
        with settings.autocast():
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def xloras(base: nn.Module, folder: Path, settings: Settings) -> tuple[nn.Module, nn.Module]:
    """Ours and PEFT's X-LoRA over the same frozen adapters, which are written to `folder`."""
    expert = adapted(base, lora(ATTENTION, rank=RANK), settings)
    paths = [str(folder / str(number)) for number in range(EXPERTS)]
    for path in paths:
        expert.save_pretrained(path)
    ours = adapted(
        base,
        MoeLoraConfig.from_preset(
            "xlora",
            init_kwargs={"paths": paths},
            num_experts=EXPERTS,
            r=RANK,
            target_modules=ATTENTION,
        ),
        settings,
    )
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=base.config.hidden_size,
        adapters={str(number): path for number, path in enumerate(paths)},
    )
    base.config.use_cache = False  # PEFT's X-LoRA asks for it, in evaluation as in training
    return ours, get_peft_model(base, config)


if __name__ == "__main__":
    main(measure, __file__, __doc__)
