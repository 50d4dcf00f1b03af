"""`moelora tasks` and `moelora presets` show every entry, and offer the nearest name."""

from __future__ import annotations

import pytest
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
    assert all(name in output for name in PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_shows_what_it_sets(name: str) -> None:
    output = runner.invoke(app, ["presets", name]).output
    assert PRESETS[name].summary in output
    assert f"Source: {PRESETS[name].source}" in output
    assert all(key in output for key in PRESETS[name].overrides)


def test_unknown_preset() -> None:
    result = runner.invoke(app, ["presets", "gr_moe_lor"])
    assert result.exit_code == 1
    assert "'gr_moe_lora'" in result.stderr
