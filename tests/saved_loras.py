"""LoRA adapters that PEFT has saved, to be routed or composed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from torch import nn

from moelora_plugin import MoeLoraConfig

TARGETS = ["q_proj", "v_proj", "down_proj"]


def save_lora(
    folder: Path, seed: int, base: nn.Module | None = None, std: float = 0.2, **keys: Any
) -> str:
    """A random LoRA adapter of a tiny Llama, whose update has a clear main direction."""
    base = tiny_llama() if base is None else base
    model = get_peft_model(base, LoraConfig(**{"target_modules": TARGETS, **keys}))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=std)
        if "lora_A" in name:  # the first rank far above the others: power iteration converges
            parameter.data[0] *= 4
    model.save_pretrained(str(folder))
    return str(folder)


def three_loras(folder: Path) -> list[str]:
    """Unlike in rank, alpha and what the scale divides by.

    Their scales 2, 4 and 1 fold into B without rounding, `config_over`'s being 1/2.
    """
    options = [
        {"r": 2, "lora_alpha": 4},
        {"r": 4, "lora_alpha": 8, "use_rslora": True},
        {"r": 3, "lora_alpha": 3},
    ]
    return [save_lora(folder / f"{i}", 10 + i, **keys) for i, keys in enumerate(options)]


def config_over(paths: list[str], **keys: Any) -> MoeLoraConfig:
    """Frozen experts from these adapters, all selected; `r` and `lora_alpha` are none of theirs."""
    defaults = {
        "r": 4,
        "lora_alpha": 2,
        "lora_dropout": 0.0,
        "num_experts": len(paths),
        "top_k": len(paths),
        "target_modules": TARGETS,
        "router": "softmax",
        "init": "adapters",
        "expert_kwargs": {"frozen": True},
        "task_type": "CAUSAL_LM",
    }
    kwargs = {"paths": paths, **keys.pop("init_kwargs", {})}
    return MoeLoraConfig(**{**defaults, "init_kwargs": kwargs, **keys})


def routed_over(paths: list[str], base: nn.Module | None = None, **keys: Any) -> nn.Module:
    """A tiny Llama with such experts, in evaluation."""
    base = tiny_llama() if base is None else base
    return get_peft_model(base, config_over(paths, **keys)).eval()


def tokens(rows: int = 2, length: int = 7, seed: int = 5) -> torch.Tensor:
    """Token ids without padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 500, (rows, length), generator=generator)
