"""An adapter on disk, described without its base."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from tiny import tiny_llama

from moelora_plugin import MoeLoraConfig
from moelora_plugin.analysis import inspect_adapter
from moelora_plugin.checkpoint import save_adapter
from moelora_plugin.errors import AdapterError, MissingDependencyError

MANIFEST = {
    "recipe": {"data": {"tasks": ["sst2", "rte"]}, "optimizer": {"name": "gradamw"}},
    "steps": 60,
    "train_loss": 0.25,
    "routing": {
        "layers.0.q_proj": {"tokens": 9, "load": [0.75, 0.25, 0, 0], "entropy": 1.0},
        "layers.1.q_proj": {"tokens": 9, "load": [1.0], "entropy": 0.0},
        "base_model.model.layers.10.q_proj": {"tokens": 9, "load": [0.5, 0.5], "entropy": 0.5},
        "base_model.model.layers.2.q_proj": {"tokens": 9, "load": [0.5, 0.5], "entropy": 0.5},
    },
}


def make(**changes: Any) -> PeftModel:
    settings = {"r": 3, "num_experts": 4, "top_k": 2, "target_modules": ["q_proj", "up_proj"]}
    return get_peft_model(tiny_llama(), MoeLoraConfig(**{**settings, **changes}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(make(), tmp_path / "adapter [1]", manifest=MANIFEST)


def shown(folder: Path, width: int = 200) -> str:
    console = Console(width=width, record=True)
    console.print(inspect_adapter(folder).table())
    return console.export_text()


def test_numbers_are_those_of_the_model(tmp_path: Path) -> None:
    model = make(modules_to_save=["lm_head"])
    summary = inspect_adapter(save_adapter(model, tmp_path / "adapter"))
    parameters = dict(model.named_parameters())
    routers = sum(p.numel() for name, p in parameters.items() if "moelora_gate" in name)
    experts = sum(
        p.numel() for name, p in parameters.items() if "moelora_A" in name or "moelora_B" in name
    )
    assert (summary.router_parameters, summary.expert_parameters) == (routers, experts)
    assert (
        routers + experts + model.lm_head.weight.numel() == model.get_nb_trainable_parameters()[0]
    )
    assert summary.modules == {"q_proj": 2, "up_proj": 2}
    assert summary.dtypes == ("F32",)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    assert summary.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (summary.config.num_experts, summary.config.top_k, summary.config.r) == (4, 2, 3)


def test_dtypes_are_the_stored_ones(tmp_path: Path) -> None:
    model = make()
    model.to(torch.bfloat16)
    assert inspect_adapter(save_adapter(model, tmp_path / "adapter")).dtypes == ("BF16",)


def test_the_table(folder: Path) -> None:
    text = shown(folder)
    summary = inspect_adapter(folder)
    for expected in (
        str(folder),  # brackets are not markup
        "4, top 2, rank 3 each (total rank 12)",
        "up_proj x 2, q_proj x 2",
        f"{summary.expert_parameters:,} in experts, {summary.router_parameters:,} in routers",
        summary.sha256,
        "on sst2, rte with gradamw, 60 steps, final mean loss 0.2500",
    ):
        assert expected in text
    (first,) = (line.split() for line in text.splitlines() if "layers.0.q_proj" in line)
    # Least and most used, unused experts, and 1 nat over log 4.
    assert [cell for cell in first if cell[0].isdigit()] == ["0.000", "0.750", "2", "0.721"]
    (second,) = (line.split() for line in text.splitlines() if "layers.1.q_proj" in line)
    assert [cell for cell in second if cell[0].isdigit()] == ["1.000", "1.000", "0", "0.000"]


def test_ranks_of_an_allocation_are_those_of_the_tensors(tmp_path: Path) -> None:
    model = make(allocation="layers", allocation_kwargs={"r": [1, 2]}, lora_alpha=4)
    text = shown(save_adapter(model, tmp_path / "adapter"))
    assert "by allocation 'layers' (total rank 4 to 8 per module)" in text
    model = make(r=8, total_rank=True)
    text = shown(save_adapter(model, tmp_path / "total"))
    assert "4, top 2, rank 2 each (total rank 8)" in text
    assert "topk, linear scores, by token, per linear" in text


def test_the_load_is_listed_in_the_order_of_the_layers(folder: Path) -> None:
    lines = [line for line in shown(folder, width=80).splitlines() if "layers." in line]
    assert [line.split()[1] for line in lines] == [
        "layers.2.q_proj",
        "layers.10.q_proj",
        "layers.0.q_proj",
        "layers.1.q_proj",
    ]


def test_an_adapter_that_peft_alone_has_saved(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    summary = inspect_adapter(tmp_path)
    assert summary.manifest == {}
    assert "trained" not in shown(tmp_path)


def test_damaged_weights_are_refused(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(AdapterError, match=r"truncated or damaged"):
        inspect_adapter(folder)
    weights.write_bytes(content[:-4] + bytes(b ^ 1 for b in content[-4:]))
    with pytest.raises(AdapterError, match=r"its sha256 is \w+"):
        inspect_adapter(folder)


def test_missing_or_unreadable_files_are_refused(folder: Path) -> None:
    config = folder / "adapter_config.json"
    config.write_text('{"peft_type": ')
    with pytest.raises(AdapterError, match=r"adapter_config\.json is not valid JSON"):
        inspect_adapter(folder)
    config.unlink()
    with pytest.raises(AdapterError, match=r"holds no adapter_config\.json"):
        inspect_adapter(folder)


def test_other_adapters_are_refused(tmp_path: Path) -> None:
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="is a LORA adapter"):
        inspect_adapter(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"r": 4}))
    with pytest.raises(AdapterError, match="is a None adapter"):
        inspect_adapter(tmp_path)


def test_a_path_that_is_neither_folder_nor_hub_id() -> None:
    with pytest.raises(MissingDependencyError, match=r"pass the path of a folder"):
        inspect_adapter("/nowhere/at/all")
