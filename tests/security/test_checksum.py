"""An edited configuration is refused by every loader, stock ones included."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

from moelora_plugin import MoeLoraConfig
from moelora_plugin.errors import AdapterError

EDITS: dict[str, Any] = {
    "lora_alpha": 32,
    "use_rslora": True,
    "top_k": 1,
    "router": "softmax",
    "router_kwargs": {"renormalize": False},
    "target_modules": ["q_proj"],
    "scale": "constant",
    "universal_expert": "one",
}
LOADERS: dict[str, Callable[[Path], Any]] = {
    "PeftConfig": lambda folder: PeftConfig.from_pretrained(str(folder)),
    "MoeLoraConfig": lambda folder: MoeLoraConfig.from_pretrained(str(folder)),
    "PeftModel": lambda folder: PeftModel.from_pretrained(tiny_llama(), str(folder)),
    "transformers": lambda folder: AutoModelForCausalLM.from_pretrained(str(folder)),
    "mapping": lambda folder: MoeLoraConfig(**json.loads(file_of(folder).read_text())),
}


def file_of(folder: Path) -> Path:
    return folder / "adapter_config.json"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved by PEFT alone: no manifest."""
    folder = tmp_path_factory.mktemp("saved")
    base = tiny_llama()
    base.save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = MoeLoraConfig(r=2, num_experts=4, top_k=2, target_modules=["q_proj", "v_proj"])
    get_peft_model(base, config).save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.fixture
def edit(adapter: Path, tmp_path: Path) -> Callable[..., Path]:
    def edited(**changes: Any) -> Path:
        content = json.loads(file_of(adapter).read_text())
        for file in adapter.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        content = {k: v for k, v in {**content, **changes}.items() if v is not ...}
        file_of(tmp_path).write_text(json.dumps(content))
        return tmp_path

    return edited


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("key", EDITS)
def test_edit_is_refused(edit: Callable[..., Path], loader: str, key: str) -> None:
    with pytest.raises(AdapterError, match=r"changed after it was saved.*checksum"):
        LOADERS[loader](edit(**{key: EDITS[key]}))


@pytest.mark.parametrize("key", ["r", "num_experts", "target_modules"])
def test_missing_key_is_refused(edit: Callable[..., Path], key: str) -> None:
    """It would stand for its default, which is another."""
    with pytest.raises(AdapterError, match="changed after it was saved"):
        PeftConfig.from_pretrained(str(edit(**{key: ...})))


def test_edit_that_is_meant(edit: Callable[..., Path]) -> None:
    config = PeftConfig.from_pretrained(str(edit(top_k=1, checksum=...)))
    assert config.top_k == 1


@pytest.mark.parametrize(
    "change",
    [{"base_model_name_or_path": "elsewhere"}, {"lora_dropout": 0.5}, {"revision": "main"}],
)
def test_what_decides_no_answer_may_change(
    edit: Callable[..., Path], change: dict[str, Any]
) -> None:
    config = PeftConfig.from_pretrained(str(edit(**change)))
    ((key, value),) = change.items()
    assert getattr(config, key) == value


def test_changes_in_memory_are_nobody_else_s(adapter: Path, tmp_path: Path) -> None:
    config = MoeLoraConfig.from_pretrained(str(adapter))
    changed = replace(config, top_k=1)
    assert MoeLoraConfig(**{**config.to_dict(), "top_k": 1}).top_k == 1
    changed.save_pretrained(str(tmp_path))
    assert MoeLoraConfig.from_pretrained(str(tmp_path)).top_k == 1


def test_numbers_of_another_kind_are_refused(adapter: Path, tmp_path: Path) -> None:
    """Of the same size in the file, they would be cast to other values."""
    file_of(tmp_path).write_text(file_of(adapter).read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(key for key in tensors if "moelora_A" in key)
    tensors[name] = tensors[name].view(torch.int32)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=rf"{re.escape(name[:-6])}.* is of torch.int32"):
        PeftModel.from_pretrained(tiny_llama(), str(tmp_path))


def test_no_default_changes() -> None:
    """A key that a file lacks, or that its checksum leaves out, stands for its default.

    Saved adapters would answer otherwise, or be refused as edited, if one of these changed. A key
    may be added, with a default under which the adapters of before answer as they did.
    """
    content = MoeLoraConfig().to_dict()
    environment = {"peft_type", "peft_version", "auto_mapping", "checksum"}
    none = {
        *("base_model_name_or_path", "exclude_modules", "layers_pattern", "layers_to_transform"),
        *("modules_to_save", "revision", "target_modules", "task_type", "trainable_token_indices"),
    }
    empty = {key for key in content if key.endswith("_kwargs")} | {"aux_losses", "router_modifiers"}
    assert {key: content[key] for key in sorted(content.keys() - environment - none - empty)} == {
        "allocation": "uniform",
        "bias": "none",
        "expert": "lora",
        "format_version": 1,
        "gate_rescale": "auto",
        "gate_rescale_scope": "weights",
        "inference_mode": False,
        "init": "kaiming",
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "num_experts": 20,
        "r": 4,
        "router": "topk",
        "router_input": "token",
        "router_score": "linear",
        "scale": "alpha",
        "site": "linear",
        "top_k": 10,
        "total_rank": False,
        "universal_expert": "none",
        "use_rslora": False,
    }
    assert {content[key] for key in none} == {None}
    assert all(content[key] == {} for key in empty)
    # Nor what the checksum of all defaults is, which is in files.
    assert content["checksum"] == "44136fa355b3678a"
