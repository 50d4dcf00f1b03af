"""From a recipe to a folder for others, through the commands alone."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import Result
from peft import AutoPeftModelForCausalLM
from task_rows import write_split
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moelora_cli.main import app
from moelora_plugin.checkpoint import load_adapter

IDS = torch.tensor([[0, 40, 50, 60, 70]])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, rows and a recipe."""
    folder = tmp_path_factory.mktemp("work")
    tiny_llama().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    generator = random.Random(0)
    good, bad = ("warm", "sharp", "moving"), ("dull", "flat", "clumsy")
    for split, count in (("train", 64), ("validation", 24)):
        rows = []
        for number in range(count):
            word = generator.choice(good if number % 2 else bad)
            rows.append({"sentence": f"a {word} film", "label": number % 2})
        write_split(folder / "rows", "sst2", split, rows)
    recipe = {
        "model": {"name": str(folder / "base")},
        "adapter": {
            "preset": "gr_moe_lora",
            "num_experts": 4,
            "top_k": 2,
            "r": 2,
            "lora_dropout": 0.0,
            "target_modules": "all-linear",
        },
        "optimizer": {"name": "gradamw", "lr": 1e-2},
        "data": {"tasks": ["sst2"], "max_length": 96},
        "training": {"max_steps": 2, "per_device_train_batch_size": 8, "logging_steps": 10},
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def moelora(*arguments: object) -> Result:
    runner = CliRunner(env={"COLUMNS": "200", "MOELORA_DATA_DIR": None})
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def test_train_evaluate_inspect_export_load(work: Path) -> None:
    rows, adapter, scores = work / "rows", work / "run" / "adapter", work / "scores.json"
    trained = moelora(
        "train", work / "recipe.yaml", "training.max_steps=100", "--data-dir", rows
    ).stdout
    assert str(adapter) in trained

    evaluated = moelora(
        *("eval", "--adapter", adapter, "--tasks", "sst2", "--data-dir", rows),
        *("--compare-base", "--output", scores),
    ).stdout
    measured = json.loads(scores.read_text())["tasks"]["sst2"]
    accuracy = {name: metrics["acc"]["value"] for name, metrics in measured["metrics"].items()}
    assert accuracy["adapter"] == 1.0  # the word decides, and 100 steps learn it
    assert accuracy["base"] < 0.75
    assert measured["differences"]["adapter"]["low"] > 0
    assert f"{100 * measured['differences']['adapter']['value']:+.2f}" in evaluated
    assert f"Written to {scores}" in evaluated

    inspected = moelora("inspect", adapter).stdout
    assert "4, top 2, rank 2 each" in inspected
    assert "on sst2 with gradamw, 100 steps" in inspected
    assert "Expert load" in inspected

    moelora("export", adapter, "--out", work / "shared", "--eval-file", scores)
    assert "| sst2 | 24 | acc |" in (work / "shared" / "README.md").read_text()
    expected, _ = load_adapter(adapter)
    loaded = AutoPeftModelForCausalLM.from_pretrained(work / "shared").eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, expected(IDS).logits)

    merged = moelora(
        *("export", adapter, "--out", work / "merged", "--to", "merged"),
        *("--strategy", "mean-gate", "--data-dir", rows),
    ).stdout
    record = json.loads((work / "merged" / "moelora_export.json").read_text())
    assert f"{record['logit_error']:.4f}" in merged
    assert isinstance(AutoModelForCausalLM.from_pretrained(work / "merged"), type(tiny_llama()))
    # What was merged is a base of its own, and still knows the words.
    moelora(
        *("eval", "--base", work / "merged", "--tasks", "sst2", "--data-dir", rows),
        *("--output", work / "merged.json"),
    )
    measured = json.loads((work / "merged.json").read_text())["tasks"]["sst2"]
    assert measured["metrics"]["base"]["acc"]["value"] > 0.9


def test_training_in_a_process_of_its_own(work: Path) -> None:
    """As people run it: nothing is imported beforehand, and warnings are shown."""
    command = ["train", "recipe.yaml", "--data-dir", "rows", "--output-dir", "alone"]
    completed = subprocess.run(
        [sys.executable, "-c", "from moelora_cli.main import main; main()", *command],
        cwd=work,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert completed.returncode == 0, completed.stderr
    assert (work / "alone" / "adapter" / "moelora.json").is_file()
    assert "alone/adapter" in completed.stdout
    assert "Traceback" not in completed.stderr
