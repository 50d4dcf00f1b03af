"""The YAML files, through lm-eval's own loader. It skips a broken file without a word."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from lm_eval.tasks import TaskManager
from task_rows import write_data

from moelora_eval_tasks.catalog import GROUPS, PREFIX, TASKS, Task
from moelora_eval_tasks.loading import load_split
from moelora_eval_tasks.metrics import METRICS
from moelora_eval_tasks.prompts import render

ROOT = Path(str(files("moelora_eval_tasks")))

# (label, prediction) of nine rows on which no two metrics agree; one row has no prediction.
PAIRS = [(1, 1), (0, 1), (1, 1), (0, 0), (1, 0), (0, 0), (2, 1), (1, -1), (0, 0)]


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    data_dir = write_data(tmp_path_factory.mktemp("data"))
    metadata = {"data_dir": str(data_dir)}
    return TaskManager(include_path=str(ROOT), include_defaults=False, metadata=metadata)


def mean_of(names: Sequence[str]) -> float:
    label, pred = np.array(PAIRS, dtype=float).T
    return float(np.mean([METRICS[name](label, pred) for name in names]))


def test_every_file_is_indexed_under_a_name_of_its_own(manager: TaskManager) -> None:
    assert manager.all_subtasks == sorted(PREFIX + name for name in TASKS)
    assert manager.all_groups == sorted(PREFIX + name for name in GROUPS)
    indexed = sorted(Path(entry.yaml_path) for entry in manager.task_index.values())
    shared = {ROOT / f"_{name}.yaml" for name in ("base", "loglikelihood", "generation")}
    assert indexed == sorted(set(ROOT.rglob("*.yaml")) - shared)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_a_file_says_what_the_catalog_says(task: Task, manager: TaskManager) -> None:
    name = PREFIX + task.name
    loaded = manager.load([name])["tasks"][name]
    config = loaded.dump_config()
    assert config["output_type"] == ("generate_until" if task.generates else "multiple_choice")
    assert config.get("dataset_path") == task.hub_id
    assert config.get("dataset_name") == task.config
    assert config["metadata"]["version"] == 1.0
    assert config["num_fewshot"] == 0
    means = {metric: (metric,) for metric in task.metrics} | {"score": task.scored}
    assert list(loaded.aggregation()) == list(means)
    for metric, names in means.items():
        assert loaded.aggregation()[metric](PAIRS) == pytest.approx(mean_of(names))
    assert all(loaded.higher_is_better().values())
    if task.generates:
        assert config["generation_kwargs"] == {
            "until": [],
            "do_sample": False,
            "temperature": 0.0,
            "repetition_penalty": 1.0,
            "max_gen_toks": task.max_new_tokens,
        }


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
    requested = [instance.args[:2] for instance in one.instances]  # then images
    rows = load_split(task, task.eval_split, manager.metadata["data_dir"])
    prompts = [render(task, row) for row in rows]
    targets = [one.doc_to_target(doc) for doc in one.eval_docs]
    assert {doc["task"] for doc in one.eval_docs} == {task.name}
    if task.generates:
        assert [context for context, _ in requested] == [p.context for p in prompts]
        assert targets == [p.choices[p.gold] for p in prompts]
    else:
        assert requested == [(p.context, choice) for p in prompts for choice in p.choices]
        assert targets == [p.gold for p in prompts]
