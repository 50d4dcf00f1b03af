"""A tiny base on disk, rows to calibrate on, and adapters of that base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from task_rows import write_data
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from moelora_plugin import MoeLoraConfig
from moelora_plugin.checkpoint import save_adapter
from moelora_plugin.model import moelora_layers

SaveAdapter = Callable[..., Path]

# As training writes it, as far as a card reads it.
MANIFEST: dict[str, Any] = {
    "recipe": {
        "data": {"tasks": ["sst2"]},
        "optimizer": {"name": "gradamw", "lr": 1e-4, "gate_lr": 3e-8},
    },
    "steps": 60,
    "trainable_parameters": 12345,
}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_data(tmp_path_factory.mktemp("data"), ["sst2", "rte"]))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def make_adapter(base: Path, **changes: Any) -> PeftModel:
    """An adapter whose experts change every answer; keywords go to its config."""
    settings = {"r": 2, "num_experts": 4, "top_k": 2, "target_modules": ["q_proj", "down_proj"]}
    config = MoeLoraConfig(task_type="CAUSAL_LM", **{**settings, **changes})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), config)
    torch.manual_seed(0)
    for layer in moelora_layers(model).values():
        for _, b in layer.expert_weights():
            b.normal_(std=0.5)
    return model.eval()


@pytest.fixture
def save(base: Path, tmp_path: Path) -> SaveAdapter:
    """Saves an adapter as training does: the one that is given, or one made with these keys."""

    def save(model: PeftModel | None = None, **changes: Any) -> Path:
        model = model or make_adapter(base, **changes)
        out = tmp_path / "adapter"
        return save_adapter(model, out, tokenizer=tiny_tokenizer(), manifest=MANIFEST)

    return save
