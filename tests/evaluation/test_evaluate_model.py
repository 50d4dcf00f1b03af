"""A model in memory, scored through lm-eval."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.evaluator import evaluate as lm_eval_evaluate
from peft import PeftModel
from rich.console import Console
from tiny import tiny_llama, tiny_tokenizer

from moelora_eval_tasks.catalog import GROUPS, PREFIX, TASKS
from moelora_eval_tasks.loading import load_split
from moelora_eval_tasks.prompts import render
from moelora_plugin.errors import ConfigError, MissingDependencyError
from moelora_plugin.evaluation import evaluate_model, harness
from moelora_plugin.evaluation.lm import wrap


def test_scores_are_those_lm_eval_aggregates(data_dir: str) -> None:
    report = evaluate_model(tiny_llama(), tiny_tokenizer(), ["text"], data_dir=data_dir)
    loaded = harness.load_tasks(["text"], data_dir)
    lm = wrap(tiny_llama(), tiny_tokenizer(), batch_size=3)
    expected = lm_eval_evaluate(lm, loaded.lm_eval, bootstrap_iters=0)["results"]
    assert list(report.tasks) == list(GROUPS["text"])
    for name, measured in report.tasks.items():
        for metric, estimate in measured.metrics["model"].items():
            value = expected[PREFIX + name][f"{metric},none"]
            # Batches of other sizes pad differently, which changes a rating by rounding (fp32).
            assert estimate.value == pytest.approx(value, abs=1e-5), (name, metric)
    mean = np.mean([measured.metrics["model"]["score"].value for measured in report.tasks.values()])
    assert report.groups["text"].metrics["model"]["score"].value == pytest.approx(mean)


def test_predictions_are_the_likeliest_answers_by_hand(data_dir: str) -> None:
    """One forward pass per answer, without lm-eval."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    report = evaluate_model(model, tokenizer, ["mrpc"], data_dir=data_dir)
    expected = []
    for row in load_split(TASKS["mrpc"], "validation", data_dir):
        prompt = render(TASKS["mrpc"], row)
        scores = []
        for choice in prompt.choices:
            ids = tokenizer(prompt.context + choice, return_tensors="pt").input_ids
            start = len(tokenizer(prompt.context).input_ids)
            with torch.no_grad():
                log_probs = model(ids).logits[0].log_softmax(-1)
            answer = ids[0, start:]
            scores.append(log_probs[start - 1 : -1].gather(1, answer[:, None]).sum().item())
        expected.append(float(np.argmax(scores)))
    assert report.predictions["model"]["mrpc"].pred.tolist() == expected


def test_the_batch_size_changes_nothing(adapter: PeftModel, data_dir: str) -> None:
    one, eight = (
        evaluate_model(adapter, tiny_tokenizer(), ["text"], data_dir=data_dir, batch_size=size)
        for size in (1, 8)
    )
    for name in GROUPS["text"]:
        # A rating is a real number: padding changes it by rounding (fp32), the others not at all.
        tolerance = 1e-5 if TASKS[name].rating else 0
        np.testing.assert_allclose(
            one.predictions["model"][name].pred,
            eight.predictions["model"][name].pred,
            atol=tolerance,
        )
        if not TASKS[name].rating:
            assert one.tasks[name] == eight.tasks[name]


def test_an_adapter_of_zero_experts_scores_as_its_base(
    zero_adapter: PeftModel, data_dir: str
) -> None:
    report = evaluate_model(
        zero_adapter, tiny_tokenizer(), ["text"], data_dir=data_dir, compare_base=True
    )
    plain = evaluate_model(tiny_llama(), tiny_tokenizer(), ["text"], data_dir=data_dir)
    for name, measured in report.tasks.items():
        scored = measured.metrics
        assert scored["model"] == scored["base"] == plain.tasks[name].metrics["model"]
        assert measured.differences["model"].interval == (0, 0)


def test_the_base_is_scored_on_the_same_load(adapter: PeftModel, data_dir: str) -> None:
    tasks = ["stsb", "qa"]
    report = evaluate_model(adapter, tiny_tokenizer(), tasks, data_dir=data_dir, compare_base=True)
    plain = evaluate_model(tiny_llama(), tiny_tokenizer(), tasks, data_dir=data_dir)
    stsb = report.tasks["stsb"]
    base, model = stsb.metrics["base"], stsb.metrics["model"]
    assert base == plain.tasks["stsb"].metrics["model"]
    assert model != base
    assert stsb.differences["model"].value == model["score"].value - base["score"].value
    assert list(report.groups["qa"].differences) == ["model"]


def test_a_limit_draws_the_same_rows_for_all(adapter: PeftModel, data_dir: str) -> None:
    report = evaluate_model(
        adapter, tiny_tokenizer(), ["cola"], data_dir=data_dir, limit=2, compare_base=True
    )
    assert report.tasks["cola"].n == 2
    base, model = (report.predictions[name]["cola"] for name in ("base", "model"))
    assert base.prompts_sha256 == model.prompts_sha256
    assert base.label.tolist() == model.label.tolist()


def test_model_and_tokenizer_are_left_as_they_were(adapter: PeftModel, data_dir: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    adapter.train()
    trainable = {name for name, p in adapter.named_parameters() if p.requires_grad}
    evaluate_model(adapter, tokenizer, ["rte"], data_dir=data_dir, compare_base=True)
    assert adapter.training
    assert tokenizer.pad_token is None
    assert {name for name, p in adapter.named_parameters() if p.requires_grad} == trainable


def test_a_model_without_an_adapter_has_no_base(data_dir: str) -> None:
    with pytest.raises(ConfigError, match="a LlamaForCausalLM has no adapter to switch off"):
        evaluate_model(
            tiny_llama(), tiny_tokenizer(), ["rte"], data_dir=data_dir, compare_base=True
        )


def test_the_table_shows_each_metric_and_the_difference(adapter: PeftModel, data_dir: str) -> None:
    report = evaluate_model(
        adapter, tiny_tokenizer(), ["mrpc", "qa"], data_dir=data_dir, compare_base=True
    )
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(report.table())
    text = console.export_text()
    difference = report.tasks["mrpc"].differences["model"]
    for shown in ("mrpc", "f1", "qa (mean)", "base", f"{100 * difference.value:+.2f} ["):
        assert shown in text


def test_the_file_holds_what_repeats_the_run(
    adapter: PeftModel, data_dir: str, output: Path
) -> None:
    report = evaluate_model(
        adapter, tiny_tokenizer(), ["rte", "qa"], data_dir=data_dir, compare_base=True, seed=3
    ).write(output)
    assert report.path == output
    content = json.loads(output.read_text(encoding="utf-8"))
    assert content["request"]["seed"] == 3
    assert content["versions"]["torch"] == torch.__version__
    assert content["models"]["model"]["adapters"]["default"]["num_experts"] == 4
    assert len(content["datasets"]["rte"]["sha256"]) == 64
    assert {"prompts.py", "glue/rte.yaml"} <= set(content["eval_tasks_sha256"])
    rte = content["predictions"]["rte"]
    for rows in (rte["label"], rte["models"]["model"], rte["models"]["base"]):
        assert len(rows) == content["tasks"]["rte"]["n"]
    assert set(content["groups"]["qa"]["differences"]["model"]) >= {
        "value",
        "low",
        "high",
        "confidence",
    }
    assert content["batch_sizes"]["model"]["rte"] > 1


def test_lm_eval_is_quiet_where_there_is_no_repository(
    data_dir: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", None)  # nothing is asked of git or of collect_env
    evaluate_model(tiny_llama(), tiny_tokenizer(), ["rte"], data_dir=data_dir)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "fatal" not in printed.err
    assert "WARNING" not in printed.err


def test_an_lm_eval_that_is_too_old_is_named(
    monkeypatch: pytest.MonkeyPatch, data_dir: str
) -> None:
    monkeypatch.delattr("lm_eval.tasks.TaskManager.load")
    monkeypatch.setattr(harness, "version", lambda name: "0.4.11")
    message = r"^Evaluation needs lm-eval 0\.4\.13 or newer, and 0\.4\.11 is installed; run pip "
    with pytest.raises(MissingDependencyError, match=message):
        harness.load_tasks(["sst2"], data_dir, None, 0)
