"""Answers that are kept from run to run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from task_rows import ROWS, write_data, write_split
from tiny import tiny_llama, tiny_tokenizer

from moelora_plugin.checkpoint import save_adapter
from moelora_plugin.evaluation import (
    EvaluationReport,
    EvaluationRequest,
    answers,
    cache,
    evaluate,
    evaluate_model,
)
from moelora_plugin.model import moelora_layers

Run = Callable[..., EvaluationReport]


@pytest.fixture
def run(base_folder: str, data_dir: str, output: Path) -> Run:
    def evaluated(**change: Any) -> EvaluationReport:
        request = {"tasks": ("rte", "sst2_gen"), "base": base_folder, "data_dir": data_dir}
        request |= {"device": "cpu", "output": output, "overwrite": True}
        return evaluate(EvaluationRequest(**request | change))

    return evaluated


def from_cache(report: EvaluationReport) -> dict[str, list[str]]:
    return report.details["from_cache"]


def test_a_second_run_asks_the_model_nothing(
    run: Run, adapter_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(adapters=(adapter_folder,), compare_base=True)
    assert from_cache(first) == {"base": [], "adapter": []}
    monkeypatch.setattr(answers, "predict", None)
    second = run(adapters=(adapter_folder,), compare_base=True, batch_size=1)
    assert from_cache(second) == {model: ["rte", "sst2_gen"] for model in ("base", "adapter")}
    assert second.tasks == first.tasks
    for model, by_task in first.predictions.items():
        for task, one in by_task.items():
            kept = second.predictions[model][task]
            np.testing.assert_array_equal(kept.pred, one.pred)
            np.testing.assert_array_equal(kept.label, one.label)
            rest = ("answers", "prompts_sha256", "expert_use")
            assert [getattr(kept, name) for name in rest] == [getattr(one, name) for name in rest]


def test_a_base_is_scored_once_for_all_adapters(run: Run, adapter_folder: str) -> None:
    run()
    report = run(adapters=(adapter_folder,), compare_base=True)
    assert from_cache(report) == {"base": ["rte", "sst2_gen"], "adapter": []}
    assert report.tasks["rte"].metrics["base"] != report.tasks["rte"].metrics["adapter"]


def test_an_interrupted_run_goes_on_where_it_was(
    run: Run, output: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    predict = answers.predict

    def interrupted(lm: Any, loaded: Any, task: Any, task_id: Any) -> Any:
        if task.name == "sst2_gen":
            raise KeyboardInterrupt
        return predict(lm, loaded, task, task_id)

    monkeypatch.setattr(answers, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert capfd.readouterr().err.splitlines()[-1].startswith("Interrupted; the cache has 1 finish")
    assert not output.exists()
    with pytest.raises(KeyboardInterrupt):
        run(cache=False)
    assert capfd.readouterr().err.splitlines()[-1] == "Interrupted; nothing is kept."
    monkeypatch.setattr(answers, "predict", predict)
    assert from_cache(run()) == {"base": ["rte"]}


def other_rows(base_folder: str, data_dir: Path) -> None:
    rows = [dict(row) for row in ROWS["rte"]]
    rows[0]["sentence1"] += " Really."
    write_split(data_dir, "rte", "validation", rows)


def other_labels(base_folder: str, data_dir: Path) -> None:
    rows = [dict(row) for row in ROWS["rte"]]
    rows[0]["label"] = 1 - rows[0]["label"]
    write_split(data_dir, "rte", "validation", rows)


def one_other_weight(base_folder: str, data_dir: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[300, 5] += 1e-4
    model.save_pretrained(base_folder)


def weights_in_other_places(base_folder: str, data_dir: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        for linear in (model.lm_head, model.model.layers[0].mlp.up_proj):
            linear.weight.copy_(linear.weight.flip(0))
    model.save_pretrained(base_folder)


def other_config(base_folder: str, data_dir: Path) -> None:
    path = Path(base_folder) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))


def other_tokenizer(base_folder: str, data_dir: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["born"])
    tokenizer.save_pretrained(base_folder)


@pytest.mark.parametrize(
    "change",
    [
        *(other_rows, other_labels, one_other_weight, weights_in_other_places),
        *(other_config, other_tokenizer),
    ],
)
def test_other_files_are_other_answers(
    run: Run, base_folder: str, tmp_path: Path, change: Callable[[str, Path], None]
) -> None:
    rows = write_data(tmp_path / "rows", ["rte"])
    run(tasks=("rte",), data_dir=str(rows))
    change(base_folder, rows)
    assert from_cache(run(tasks=("rte",), data_dir=str(rows))) == {"base": []}


@pytest.mark.parametrize(
    "change", [{"dtype": "bfloat16"}, {"guess": True}, {"limit": 3}], ids=lambda change: str(change)
)
def test_other_settings_are_other_answers(run: Run, change: dict[str, Any]) -> None:
    run(tasks=("sst2_gen",))
    assert from_cache(run(tasks=("sst2_gen",), **change)) == {"base": []}


def test_other_versions_are_other_answers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    known = cache.environment()
    assert set(known) >= {"torch", "transformers", "peft", "lm_eval", "moelora"}
    run(tasks=("rte",))
    monkeypatch.setattr(cache, "environment", lambda: known | {"peft": "0.0.0"})
    assert from_cache(run(tasks=("rte",))) == {"base": []}


def test_other_weights_of_an_adapter_are_other_answers(
    run: Run, adapter: PeftModel, adapter_folder: str, base_folder: str
) -> None:
    run(adapters=(adapter_folder,), tasks=("rte",))
    next(iter(moelora_layers(adapter).values())).expert_weights()[0][1].mul_(2)
    save_adapter(adapter, adapter_folder, overwrite=True)
    assert from_cache(run(adapters=(adapter_folder,), tasks=("rte",))) == {"adapter": []}


@pytest.mark.parametrize(
    "damage", ["", "{}", "[1]", "[" * 100_000, "half", "short", "text", "rows", "infinite"]
)
def test_a_damaged_entry_is_answered_anew(run: Run, cache_folder: Path, damage: str) -> None:
    expected = run(tasks=("rte",)).tasks
    (entry,) = (cache_folder / "evaluation").iterdir()
    whole = entry.read_text()
    short = json.loads(whole)
    short["pred"].pop()
    changes = {
        "text": {"answers": "A" * len(short["label"])},
        "rows": {"pred": [[one] for one in short["label"]]},
        "infinite": {"pred": [float("inf")] * len(short["label"])},
    }
    damaged = {name: json.dumps(json.loads(whole) | change) for name, change in changes.items()}
    damaged |= {"half": whole[: len(whole) // 2], "short": json.dumps(short)}
    entry.write_text(damaged.get(damage, damage))
    report = run(tasks=("rte",))
    assert from_cache(report) == {"base": []}
    assert report.tasks == expected
    assert entry.read_text() == whole


def test_no_cache_keeps_nothing_and_takes_nothing(run: Run, cache_folder: Path) -> None:
    run(cache=False)
    assert not list(cache_folder.iterdir())
    run()
    assert from_cache(run(cache=False)) == {"base": []}


def test_a_cache_that_cannot_be_written_to_is_done_without(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOELORA_CACHE", str(tmp_path / "file"))
    assert run(tasks=("rte",)).tasks["rte"].n == len(ROWS["rte"])


def test_models_in_memory_are_not_kept(data_dir: str, cache_folder: Path) -> None:
    evaluate_model(tiny_llama(), tiny_tokenizer(), ["rte"], data_dir=data_dir)
    assert not list(cache_folder.iterdir())
