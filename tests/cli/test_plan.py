"""`moelora plan`: a recipe, keys and options say the same thing; JSON is for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tiny_llama
from typer.testing import CliRunner

from moelora_cli.main import app
from moelora_plugin.training import planning

SMALL = ["adapter.target_modules=[q_proj]", "--batch-size", "2", "--length", "8"]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_llama().config.save_pretrained(tmp_path / "base")
    recipe = {
        "model": {"name": "base", "dtype": "float32"},
        "adapter": {"preset": "moe_lora", "target_modules": ["q_proj"]},
        "optimizer": {"name": "rsgd"},
        "data": {"tasks": ["sst2"], "max_length": 8},
        "training": {"per_device_train_batch_size": 2, "max_steps": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["plan", *arguments, "--json"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def test_a_recipe_and_what_replaces_its_keys(work: Path) -> None:
    plan = planned("recipe.yaml", "adapter.preset=r_moe_lora", "adapter.num_experts=12")
    assert plan["at"]["optimizer"] == "rsgd"
    assert (plan["at"]["batch"], plan["at"]["length"]) == (2, 8)
    assert [(m["name"], m["count"], m["ranks"]) for m in plan["modules"]] == [
        ("q_proj", 2, [4] * 12)
    ]
    assert plan["ours"]["optimizer_bytes"] == 0
    assert plan["ours"]["peak_bytes"] > plan["ours"]["weight_bytes"]
    assert {path.name for path in work.iterdir()} == {"base", "recipe.yaml"}


def test_options_alone(work: Path) -> None:
    plan = planned("--model", "base", "--preset", "r_moe_lora", *SMALL, "--dtype", "bfloat16")
    assert plan["base"] == "base"
    assert plan["dtype"] == "bfloat16"
    assert plan["at"] == {
        "optimizer": "gradamw",
        "batch": 2,
        "length": 8,
        "autocast": None,
        "checkpointing": False,
    }
    assert plan["modules"][0]["ranks"] == [4] * 20


def test_keys_of_the_training_section(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    monkeypatch.setattr(planning, "plan_adapter", lambda *a, **k: steps.append((a[2], k)))
    planning.plan("recipe.yaml", ["training.bf16=true", "training.gradient_checkpointing=true"])
    planning.plan("recipe.yaml", ["training.fp16=true", "model.revision=v1"])
    (mixed, _), (half, options) = steps
    assert (mixed.autocast, mixed.checkpointing) == ("bfloat16", True)
    assert (half.autocast, half.checkpointing) == ("float16", False)
    assert options == {"revision": "v1", "dtype": "float32"}


def test_the_table(work: Path) -> None:
    result = CliRunner().invoke(app, ["plan", "recipe.yaml", "--gradient-checkpointing"])
    assert result.exit_code == 0, result.output
    assert "gradient checkpointing" in result.output
    assert "LoRA, same rank" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "mola"], ("--model", "model.name")),
        (["--model", "nowhere/nothing"], ("'nowhere/nothing'", "--model on the command line")),
        (["--model", "base", "--preset", "molaa"], ("preset 'molaa'", "'mola'")),
        (["--model", "base", *SMALL, "--dtype", "half"], ("'half'", "float16")),
        (["--model", "base", "--batch-size", "0"], ("training.per_device_train_batch_size", "0")),
        (["--model", "base", "--length", "0"], ("data.max_length", "0")),
        (["missing.yaml"], ("missing.yaml",)),
        (["recipe.yaml", "other.yaml"], ("other.yaml", "key=value")),
        (["recipe.yaml", "adapter.topk=3"], ("'topk'", "'top_k'")),
        (["recipe.yaml", "adapter.target_modules=[nothing]"], ("target_modules", "q_proj")),
        (["--model", "base", "--preset", "xlora"], ("init_kwargs.paths",)),
    ],
)
def test_what_is_wrong_is_one_sentence(
    work: Path, arguments: list[str], said: tuple[str, ...]
) -> None:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 1, result.output + repr(result.exception)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    for part in ("Error: ", *said):
        assert part in line
