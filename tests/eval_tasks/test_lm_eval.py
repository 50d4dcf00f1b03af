"""The YAML files, through lm-eval's own loader. It skips a broken file without a word."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.tasks import TaskManager
from task_rows import write_data

from moelora_eval_tasks.catalog import GROUPS, PREFIX, TASKS, Task
from moelora_eval_tasks.loading import load_split
from moelora_eval_tasks.prompts import render

ROOT = Path(str(files("moelora_eval_tasks")))


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    data_dir = write_data(tmp_path_factory.mktemp("data"))
    metadata = {"data_dir": str(data_dir)}
    return TaskManager(include_path=str(ROOT), include_defaults=False, metadata=metadata)


def test_every_file_is_indexed_under_a_name_of_its_own(manager: TaskManager) -> None:
    assert manager.all_subtasks == sorted(PREFIX + name for name in TASKS)
    assert manager.all_groups == sorted(PREFIX + name for name in GROUPS)
    indexed = sorted(Path(entry.yaml_path) for entry in manager.task_index.values())
    assert indexed == sorted(set(ROOT.rglob("*.yaml")) - {ROOT / "_base.yaml"})


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_a_file_says_what_the_catalog_says(task: Task, manager: TaskManager) -> None:
    name = PREFIX + task.name
    config = manager.load([name])["tasks"][name].dump_config()
    assert config["dataset_path"] == task.hub_id
    assert config.get("dataset_name") == task.config
    assert [one["metric"] for one in config["metric_list"]] == [*task.metrics, "score"]
    assert config["metadata"]["version"] == 1.0
    assert config["num_fewshot"] == 0


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_averages_the_score_of_all_its_tasks(name: str, manager: TaskManager) -> None:
    entry: Any = manager.task_index[PREFIX + name]
    config = yaml.safe_load(entry.yaml_path.read_text(encoding="utf-8"))
    assert config["task"] == [PREFIX + member for member in GROUPS[name]]
    assert config["aggregate_metric_list"] == [
        {"metric": "score", "aggregation": "mean", "weight_by_size": False, "filter_list": ["none"]}
    ]


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_what_is_scored_is_what_is_trained(task: Task, manager: TaskManager) -> None:
    """lm-eval's (context, continuation) pairs, byte for byte those of `render`."""
    name = PREFIX + task.name
    one = manager.load([name])["tasks"][name]
    one.build_all_requests(limit=None, rank=0, world_size=1)
    requested = [instance.args for instance in one.instances]
    rows = load_split(task, task.eval_split, manager.metadata["data_dir"])
    prompts = [render(task, row) for row in rows]
    assert requested == [(p.context, choice) for p in prompts for choice in p.choices]
    assert [one.doc_to_target(doc) for doc in one.eval_docs] == [p.gold for p in prompts]


def test_the_readme_describes_every_task() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in TASKS if f"`{name}`" not in text] == []
