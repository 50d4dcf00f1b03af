"""Every task on real rows, in the folder that MOELORA_DATA_DIR names."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from tiny import tiny_llama, tiny_tokenizer

from moelora_eval_tasks.catalog import GROUPS, TASKS
from moelora_eval_tasks.loading import load_split
from moelora_eval_tasks.prompts import render
from moelora_plugin.errors import DataError
from moelora_plugin.evaluation import evaluate_model

pytestmark = pytest.mark.data

# Splits of which public copies of the datasets in other repositories hold only a part.
PARTIAL = {"scienceqa", "qqp"}

# Rows per answer in the official evaluation split, where it is the whole one.
BALANCE = {
    "commonsenseqa": [239, 255, 241, 251, 235],
    "openbookqa": [138, 126, 132, 104],
    "siqa": [643, 654, 657],
    "cola": [322, 721],
    "sst2": [428, 444],
    "mrpc": [129, 279],
    "mnli": [3479, 3123, 3213],
    "qnli": [2702, 2761],
    "rte": [146, 131],
    "wnli": [40, 31],
}


@pytest.fixture(scope="module")
def data_dir() -> str:
    folder = os.environ.get("MOELORA_DATA_DIR")
    if not folder:
        pytest.skip("MOELORA_DATA_DIR names no folder with real rows")
    return folder


@pytest.mark.parametrize("name", GROUPS["text"])
def test_every_evaluation_row_renders(name: str, data_dir: str) -> None:
    task = TASKS[name]
    rows = load_split(task, task.eval_split, data_dir)
    prompts = [render(task, row) for row in rows]
    if name in PARTIAL:
        assert 0 < len(rows) <= task.eval_rows
    else:
        assert len(rows) == task.eval_rows
    assert all(prompt.context.endswith(f"### Response:\n{task.stem}") for prompt in prompts)
    counts = Counter(prompt.gold for prompt in prompts)
    if name in BALANCE:
        assert [counts[answer] for answer in sorted(counts)] == BALANCE[name]
    assert max(counts.values()) < 0.8 * len(rows)


@pytest.mark.parametrize("name", GROUPS["text"])
def test_every_training_row_renders(name: str, data_dir: str) -> None:
    task = TASKS[name]
    rows = load_split(task, "train", data_dir)
    assert {render(task, row).gold for row in rows} >= set(range(len(task.answers)))


def test_hidden_labels_are_refused(data_dir: str) -> None:
    with pytest.raises(DataError, match="no label in 1140 of its 1140 rows"):
        load_split(TASKS["commonsenseqa"], "test", data_dir)


def test_all_tasks_are_scored(data_dir: str) -> None:
    report = evaluate_model(tiny_llama(), tiny_tokenizer(), ["text"], data_dir=data_dir, limit=20)
    assert [measured.n for measured in report.tasks.values()] == [20] * 13
    assert abs(report.groups["text"].metrics["score"].value) < 0.6  # a random model knows nothing
