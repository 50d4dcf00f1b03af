"""`moelora tasks` and `moelora presets` show every entry, and offer the nearest name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from task_rows import write_data
from typer.testing import CliRunner

from moelora_cli.main import app
from moelora_eval_tasks.catalog import GROUPS, TASKS, Task
from moelora_plugin.presets import PRESETS

runner = CliRunner(env={"COLUMNS": "160", "MOELORA_DATA_DIR": None})
narrow = CliRunner(env={"COLUMNS": "80", "MOELORA_DATA_DIR": None})


def test_tasks_lists_each_benchmark_with_its_protocols_and_each_group() -> None:
    output = runner.invoke(app, ["tasks"]).output
    lines = {line.split()[0]: line for line in output.splitlines() if line.strip()}
    for task in TASKS.values():
        if not task.generates:
            line = lines[task.benchmark]
            assert task.summary in line
            assert f"{task.eval_rows:,}" in line
            also = [name for name in ("_gen", "_paper") if task.benchmark + name in TASKS]
            assert [word for word in line.split() if word.startswith("_")] == also
    assert "wnli_gen" not in output
    line = next(line for line in output.splitlines() if line.split()[-1:] == ["wnli"])
    assert line.split() == ["glue", "glue_gen", "glue_paper", *GROUPS["glue"]]
    assert set(GROUPS) <= set(output.split())


def test_tasks_of_a_group() -> None:
    output = runner.invoke(app, ["tasks", "qa_gen"]).output
    assert [line.split()[0] for line in output.splitlines() if "parsed" in line] == [
        *GROUPS["qa_gen"]
    ]


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_task_shows_its_prompt(task: Task) -> None:
    result = runner.invoke(app, ["tasks", task.name])
    assert result.exit_code == 0, result.output
    facts = (task.hub_id or "moelora data prepare", task.folder, task.eval_split, *task.columns)
    rows = "" if task.eval_slice == ":" else f" [{task.eval_slice}]"
    for text in (*facts, *task.metrics, f"{rows}: {task.eval_rows:,} rows"):
        assert text in result.output
    for title, _ in task.inputs:
        assert f"<{title.lower()}>" in result.output
    if task.answers:
        assert all(answer in result.output for answer in task.answers)
    elif task.options:
        assert "<second option>" in result.output
    if not task.generates:
        assert task.stem in result.output


def test_task_shows_a_row_of_the_data_folder(tmp_path: Path) -> None:
    write_data(tmp_path, ["scienceqa_gen"])
    arguments = ["tasks", "scienceqa_gen"]
    for output in (
        runner.invoke(app, [*arguments, "--data-dir", str(tmp_path)]).output,
        runner.invoke(app, arguments, env={"MOELORA_DATA_DIR": str(tmp_path)}).output,
    ):
        assert "Options: (A) steam (B) ice" in output
        assert "right: Answer: The answer is B." in output


def test_a_task_that_is_not_in_the_data_folder_is_one_sentence(tmp_path: Path) -> None:
    write_data(tmp_path, ["mnli"])
    result = runner.invoke(app, ["tasks", "mnli_paper", "--data-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert "::15" in result.output
    assert len(result.stderr.splitlines()) == 1
    assert "validation_mismatched.parquet does not exist" in result.stderr
    assert "as a part of mnli_paper" in result.stderr


@pytest.mark.parametrize("name", [[], ["paper"], ["mnli_paper"], ["stsb_gen"], ["scienceqa"]])
def test_tasks_fit_eighty_columns(name: list[str]) -> None:
    result = narrow.invoke(app, ["tasks", *name])
    assert max(map(len, result.output.splitlines())) <= 80
    assert "…" not in result.output


def test_unknown_task() -> None:
    result = runner.invoke(app, ["tasks", "sst3"])
    assert result.exit_code == 1
    assert "'sst2'" in result.stderr


def test_presets_lists_every_preset() -> None:
    output = runner.invoke(app, ["presets"]).output
    for name, preset in PRESETS.items():
        row = next(line for line in output.splitlines() if line.split()[:1] == [name])
        assert preset.summary in row
        assert preset.source.endswith(row.split()[-1])  # its arXiv id


def test_presets_fit_eighty_columns() -> None:
    for arguments in (["presets"], ["presets", "goat"], ["presets", "genknowsub"]):
        result = narrow.invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert max(map(len, result.output.splitlines())) <= 80


@pytest.mark.parametrize("name", PRESETS)
def test_preset_shows_what_it_sets(name: str) -> None:
    preset = PRESETS[name]
    output = runner.invoke(app, ["presets", name]).output
    words = " ".join(output.split())
    for text in (preset.summary, preset.title, preset.source, preset.numbers, *preset.omits):
        assert " ".join(text.split()) in words
    rows = {line.split()[0]: line.split()[-1] for line in output.splitlines() if line.split()}
    for key in PRESETS["mola"].overrides:
        assert rows[key] == ("preset" if key in preset.overrides else "default")
    assert all(f"Needs {key}" in words for key in preset.needs)
    assert f"preset: {name}" in output


def test_presets_as_json() -> None:
    listed = json.loads(runner.invoke(app, ["presets", "--json"]).output)
    assert [entry["name"] for entry in listed] == list(PRESETS)
    shown = json.loads(runner.invoke(app, ["presets", "poly", "--json"]).output)
    assert shown["source"] == PRESETS["poly"].source
    assert shown["config"]["expert"] == "mixed_factors"
    assert shown["config"]["gate_rescale"] == "auto"  # a default
    assert shown["config"]["router_score_kwargs"] == {"width": None, "num_ids": None}
    assert shown["set_by_the_preset"] == sorted(PRESETS["poly"].overrides)


@pytest.mark.parametrize("name", ["moe_lora", "poly", "genknowsub", "guilomo"])
def test_the_recipe_of_a_preset_is_one(name: str) -> None:
    """What stands below "In a recipe" is YAML with a place for all that is needed."""
    output = runner.invoke(app, ["presets", name]).output
    recipe = yaml.safe_load(output.partition("recipe.yaml`):\n")[2].replace("...", "null"))
    assert recipe["adapter"]["preset"] == name
    for key in PRESETS[name].needs:
        field, _, option = key.partition(".")
        assert not option or option in recipe["adapter"][field]
        assert field in recipe["adapter"]


def test_unknown_preset() -> None:
    result = runner.invoke(app, ["presets", "gr_moe_lor"])
    assert result.exit_code == 1
    assert "'gr_moe_lora'" in result.stderr
