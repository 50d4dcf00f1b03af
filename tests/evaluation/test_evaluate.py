"""An evaluation from files to a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import PeftModel
from tiny import tiny_llama, tiny_tokenizer

from moelora_plugin.errors import AdapterError, ConfigError, DataError
from moelora_plugin.evaluation import EvaluationRequest, evaluate, evaluate_model, runner


def test_an_adapter_from_disk_scores_as_the_one_in_memory(
    adapter: PeftModel, adapter_folder: str, base_folder: str, data_dir: str, output: Path
) -> None:
    request = EvaluationRequest(
        tasks=("stsb",),
        adapters=(adapter_folder,),
        data_dir=data_dir,
        compare_base=True,
        device="cpu",
        output=output,
    )
    report = evaluate(request)
    in_memory = evaluate_model(
        adapter, tiny_tokenizer(), ["stsb"], data_dir=data_dir, compare_base=True
    )
    from_disk, expected = (one.tasks["stsb"].metrics for one in (report, in_memory))
    assert list(from_disk) == ["base", "adapter"]
    assert from_disk["adapter"] == expected["model"]
    assert from_disk["base"] == expected["base"]
    content = json.loads(output.read_text(encoding="utf-8"))
    assert content["request"]["tasks"] == ["stsb"]
    assert content["models"]["adapter"]["base"] == base_folder
    assert content["models"]["adapter"]["path"] == adapter_folder
    assert len(content["models"]["adapter"]["sha256"]["adapter_model.safetensors"]) == 64


def test_a_base_alone_is_scored(base_folder: str, data_dir: str, output: Path) -> None:
    request = EvaluationRequest(
        tasks=("rte",), base=base_folder, data_dir=data_dir, device="cpu", output=output
    )
    in_memory = evaluate_model(tiny_llama(), tiny_tokenizer(), ["rte"], data_dir=data_dir)
    scored = evaluate(request).tasks["rte"].metrics["base"]
    assert scored == in_memory.tasks["rte"].metrics["model"]
    assert output.is_file()


def test_a_base_without_a_tokenizer_is_refused(data_dir: str, tmp_path: Path, output: Path) -> None:
    folder = tmp_path / "base"
    tiny_llama().save_pretrained(folder)
    request = EvaluationRequest(
        tasks=("rte",), base=str(folder), data_dir=data_dir, device="cpu", output=output
    )
    with pytest.raises(ConfigError, match="holds a model but no tokenizer"):
        evaluate(request)


def test_what_can_be_refused_is_refused_before_the_model_is_loaded(
    data_dir: str, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "subjects", None)

    def refused(**change: object) -> None:
        request = {"tasks": ("rte",), "base": "a/model", "data_dir": data_dir, "output": output}
        evaluate(EvaluationRequest(**request | change))  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match="Unknown task 'rtee'; did you mean 'rte'"):
        refused(tasks=("rtee",))
    with pytest.raises(DataError, match="does not exist"):
        refused(data_dir=str(output.parent / "nowhere"))
    output.write_text("{}")
    with pytest.raises(ConfigError, match="already holds something"):
        refused()
    assert output.read_text() == "{}"


def test_a_damaged_adapter_leaves_no_file(adapter_folder: str, data_dir: str, output: Path) -> None:
    weights = Path(adapter_folder) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    request = EvaluationRequest(
        tasks=("rte",), adapters=(adapter_folder,), data_dir=data_dir, output=output
    )
    with pytest.raises(AdapterError, match="truncated or damaged"):
        evaluate(request)
    assert not output.exists()
