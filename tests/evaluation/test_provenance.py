"""Two runs that differ in something differ in their records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from task_rows import ROWS, write_split
from tiny import tiny_llama, tiny_tokenizer

from moelora_eval_tasks.catalog import TASKS
from moelora_plugin import MoeLoraConfig
from moelora_plugin.checkpoint import save_adapter
from moelora_plugin.evaluation import evaluate_model, provenance
from moelora_plugin.evaluation.harness import load_tasks


def record(model: Any, output: Path, data_dir: str, **options: Any) -> dict[str, Any]:
    options = {"tasks": ["rte"], **options}
    report = evaluate_model(model, tiny_tokenizer(), data_dir=data_dir, **options)
    report.write(output)
    content: dict[str, Any] = json.loads(output.read_text())
    return content


def test_the_record_is_complete(adapter: PeftModel, data_dir: str, output: Path) -> None:
    content = record(adapter, output, data_dir, tasks=["rte", "sst2_gen"], seed=7)
    assert set(content["versions"]) >= {
        *("python", "moelora", "torch", "transformers", "peft", "accelerate", "tokenizers"),
        *("lm_eval", "datasets", "numpy", "scipy"),
    }
    assert content["versions"]["torch"] == torch.__version__
    model = content["models"]["model"]
    assert model["dtype"] == "torch.float32"
    assert model["device"] == "cpu"
    assert model["device_name"]
    assert model["attention"] == "sdpa"
    assert model["quantization"] is None
    assert model["adapters"]["default"]["router"] == "topk"
    assert content["request"]["seed"] == 7
    assert content["protocols"]["rte"] == {
        "protocol": "loglikelihood",
        "version": 1.0,
        "num_fewshot": 0,
        "generation": None,
    }
    assert content["protocols"]["sst2_gen"]["generation"]["max_gen_toks"] == 10
    assert len(content["predictions"]["rte"]["prompts_sha256"]) == 64
    assert {"prompts.py", "glue/rte.yaml"} <= set(content["eval_tasks_sha256"])
    assert content["command"]


def test_other_rows_are_seen(data_dir: str, output: Path, tmp_path: Path) -> None:
    other_rows = [{**row, "sentence2": "Nothing happened."} for row in ROWS["rte"]]
    changed = tmp_path / "changed"
    write_split(changed, "rte", "validation", other_rows)
    one = record(tiny_llama(), output, data_dir)
    other = record(tiny_llama(), output, str(changed))
    assert one["datasets"]["rte"]["sha256"] != other["datasets"]["rte"]["sha256"]
    prompts = [content["predictions"]["rte"]["prompts_sha256"] for content in (one, other)]
    assert prompts[0] != prompts[1]


def test_rows_of_the_hub_go_by_revision_and_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Mock(return_value=Mock(_fingerprint="abc"))
    monkeypatch.setattr("datasets.load_dataset", load)
    found = provenance.datasets_of([TASKS["rte"]], None)["rte"]
    assert found["hub_id"] == "nyu-mll/glue"
    assert found["revision"] == TASKS["rte"].revision
    assert found["fingerprint"] == "abc"
    load.assert_called_once_with(
        "nyu-mll/glue", "rte", split="validation", revision=TASKS["rte"].revision
    )
    load.side_effect = ConnectionError("the network is gone by now")
    assert provenance.datasets_of([TASKS["rte"]], None)["rte"]["fingerprint"] is None


def test_another_base_is_seen_and_an_adapter_changes_nothing_of_it() -> None:
    def fingerprint(model: Any) -> Any:
        return provenance.model_of(model)["base_fingerprint"]

    base = fingerprint(tiny_llama())
    assert len(base) == 64
    moelora = MoeLoraConfig(r=2, num_experts=2, top_k=1, target_modules=["q_proj"])
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    for config in (moelora, lora):
        assert fingerprint(get_peft_model(tiny_llama(), config)) == base
    assert fingerprint(tiny_llama(seed=1)) != base
    assert fingerprint(tiny_llama().to(torch.bfloat16)) != base
    with torch.device("meta"):
        assert fingerprint(tiny_llama()) is None


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("revision", {"_commit_hash": "0" * 40}),
        ("quantization", {"quantization_config": {"load_in_4bit": True}}),
        ("attention", {"_attn_implementation": "eager"}),
    ],
)
def test_what_the_base_is_held_as_is_seen(key: str, change: dict[str, Any]) -> None:
    model = tiny_llama()
    before = provenance.model_of(model)[key]
    for name, value in change.items():
        setattr(model.config, name, value)
    after = provenance.model_of(model)[key]
    assert after != before
    json.dumps(after)


def test_another_adapter_is_seen(adapter: PeftModel, tmp_path: Path) -> None:
    folder = save_adapter(adapter, tmp_path / "adapter")
    one = provenance.adapter_of(str(folder))["sha256"]
    other = shutil.copytree(folder, tmp_path / "other")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        file = other / name
        file.write_bytes(file.read_bytes() + b" ")
        changed = provenance.adapter_of(str(other))["sha256"]
        assert changed[name] != one[name]


def test_another_command_line_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["moelora", "eval", "--seed", "3"])
    assert provenance.environment()["command"] == ["moelora", "eval", "--seed", "3"]


def test_settings_follow_the_task_files(data_dir: str) -> None:
    loaded = load_tasks(["rte"], data_dir)
    before = provenance.settings_of(loaded)
    loaded.lm_eval["tasks"]["moelora_rte"].config.metadata["version"] = 2.0
    assert provenance.settings_of(loaded) != before
