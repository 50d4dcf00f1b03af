"""What the evaluation tests share: data, a base and adapters on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from task_rows import write_data
from tiny import tiny_llama, tiny_tokenizer

from moelora_plugin import MoeLoraConfig
from moelora_plugin.checkpoint import save_adapter
from moelora_plugin.model import moelora_layers


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_data(tmp_path_factory.mktemp("data")))


@pytest.fixture
def zero_adapter() -> PeftModel:
    """As it is before training: every expert's B is zero."""
    config = MoeLoraConfig(r=2, num_experts=4, top_k=2, target_modules=["q_proj", "v_proj"])
    return get_peft_model(tiny_llama(), config)


@pytest.fixture
def adapter(zero_adapter: PeftModel) -> PeftModel:
    """One whose experts change every answer."""
    torch.manual_seed(0)
    for layer in moelora_layers(zero_adapter).values():
        for _, b in layer.expert_weights():
            b.normal_(std=0.5)
    return zero_adapter


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "moelora_eval.json"


@pytest.fixture
def base_folder(tmp_path: Path) -> str:
    folder = tmp_path / "base"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def adapter_folder(adapter: PeftModel, base_folder: str, tmp_path: Path) -> str:
    adapter.peft_config["default"].base_model_name_or_path = base_folder
    return str(save_adapter(adapter, tmp_path / "adapter"))
