"""The READMEs name what there is."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

import moelora_eval_tasks
from moelora_eval_tasks.catalog import BENCHMARKS, GROUPS, TASKS

ROOT = Path(moelora_eval_tasks.__file__).parent


def _named(text: str) -> set[str]:
    """What stands in backticks."""
    return set(re.findall(r"`([^`\n]+)`", text))


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda module: module.__name__)
def test_a_folders_readme_has_its_tasks_rows_columns_and_source(benchmark: ModuleType) -> None:
    text = (Path(str(benchmark.__file__)).parent / "README.md").read_text(encoding="utf-8")
    named = _named(text)
    for task in benchmark.TASKS:
        expected = {task.name, *task.columns, *(old for old, _ in task.renamed)}
        expected |= {name for name in (task.hub_id, task.image) if name}
        assert expected <= named, task.name
        assert any(name.split("/")[0] == task.folder for name in named), task.folder
        assert f"{task.eval_rows:,}" in text
        assert task.eval_split in text


def test_the_overview_names_every_benchmark_and_group() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = _named(text)
    assert {task.benchmark for task in TASKS.values()} <= named
    assert set(GROUPS) <= named
    linked = set(re.findall(r"\((\w+)/README\.md\)", text))
    assert linked == {benchmark.__name__.rpartition(".")[2] for benchmark in BENCHMARKS}
