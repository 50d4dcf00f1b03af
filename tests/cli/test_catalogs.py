"""`moelora tasks` and `moelora presets` show every entry, and offer the nearest name."""

from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

from moelora_cli.main import app
from moelora_eval_tasks.catalog import GROUPS, TASKS
from moelora_plugin.presets import PRESETS

runner = CliRunner(env={"COLUMNS": "160"})


def test_tasks_lists_every_task_and_group() -> None:
    output = runner.invoke(app, ["tasks"]).output
    for task in TASKS.values():
        assert task.name in output
        assert f"({task.eval_rows})" in output
    for group, members in GROUPS.items():
        assert f"group {group}: {', '.join(members)}" in output


def test_tasks_of_a_group() -> None:
    output = runner.invoke(app, ["tasks", "qa"]).output
    assert "openbookqa" in output
    assert "sst2" not in output


@pytest.mark.parametrize("name", TASKS)
def test_task_shows_its_prompt(name: str) -> None:
    task = TASKS[name]
    result = runner.invoke(app, ["tasks", name])
    assert result.exit_code == 0, result.output
    for text in (task.hub_id, task.revision, task.folder, task.eval_split, task.instruction):
        assert text in result.output
    for title, _ in task.inputs:
        assert f"{title}: <{title.lower()}>" in result.output
    assert all(metric in result.output for metric in task.metrics)
    assert task.stem in result.output


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
    narrow = CliRunner(env={"COLUMNS": "80"})
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
