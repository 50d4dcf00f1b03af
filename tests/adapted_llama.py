"""A tiny Llama whose experts all do something."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tiny import enable_checkpointing, tiny_llama

from moelora_plugin import MoeLoraConfig
from moelora_plugin.model import moelora_layers

TARGETS = ["q_proj", "up_proj"]
# What a score or an input cannot do without.
NEEDS: dict[str, dict[str, Any]] = {
    "embedding": {"router_input": "task"},
    "assigned": {"router_input": "task"},
    "task": {"router_score": "embedding"},
    "cluster": {"router_score": "embedding"},
    "none": {"router_score": "static"},
}


def adapted_llama(seed: int = 0, layers: int = 2, **keys: Any) -> PeftModel:
    """In evaluation, every parameter of the adapter random."""
    defaults = {"r": 1, "num_experts": 4, "top_k": 2, "lora_alpha": 2.0, "lora_dropout": 0.0}
    config = MoeLoraConfig(
        **{"target_modules": TARGETS, "task_type": "CAUSAL_LM", **defaults, **keys}
    )
    model = get_peft_model(tiny_llama(layers=layers), config)
    randomize(model, seed)
    return model.eval()


def randomize(model: PeftModel, seed: int = 0) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in moelora_layers(model).values():
            for name, parameter in layer.named_parameters():
                if "moelora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.5)


def sentences(rows: int = 3, length: int = 7, seed: int = 1) -> torch.Tensor:
    """Token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 500, (rows, length), generator=generator)


def cache_of(output: Any) -> dict[str, Any]:
    """A call's cache, under the name that the next call takes it by (new in transformers 5.24)."""
    return {name: value for name, value in output.items() if hasattr(value, "get_seq_length")}


def checkpoint_activations(model: PeftModel, reentrant: bool) -> None:
    """Recompute each decoder layer in the backward."""
    model.enable_input_require_grads()
    enable_checkpointing(model.get_base_model(), reentrant)
