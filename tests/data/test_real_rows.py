"""Every task on real rows, in the folder that MOELORA_DATA_DIR names."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from tiny import tiny_llama, tiny_tokenizer

from moelora_eval_tasks.catalog import GROUPS, TASKS, Task
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
    "mrpc_paper": [578, 1147],
    "stsb_paper": [389, 258, 310, 335, 208],
    "mnli": [3479, 3123, 3213],
    "qnli": [2702, 2761],
    "rte": [146, 131],
    "wnli": [40, 31],
}


TEXT = [task for task in TASKS.values() if task.benchmark in GROUPS["text"]]
WITHOUT_MISMATCHED = [task for task in TEXT if task.name != "mnli_paper"]


@pytest.mark.parametrize("task", WITHOUT_MISMATCHED, ids=lambda task: task.name)
def test_every_evaluation_row_renders(task: Task, real_dir: str) -> None:
    rows = load_split(task, task.eval_split, real_dir)
    prompts = [render(task, row) for row in rows]
    if task.benchmark in PARTIAL:
        assert 0 < len(rows) <= task.eval_rows
    else:
        assert len(rows) == task.eval_rows
    ending = "Answer:\n|Response:\n" if task.generates else f"### Response:\n{task.stem}"
    assert all(re.search(f"(?:{ending})$", prompt.context) for prompt in prompts)
    counts = Counter(prompt.gold for prompt in prompts)
    if balance := BALANCE.get(task.name, BALANCE.get(task.benchmark)):
        assert [counts[answer] for answer in sorted(counts)] == balance
    assert max(counts.values()) < 0.8 * len(rows)


@pytest.mark.parametrize("task", TEXT, ids=lambda task: task.name)
def test_every_training_row_renders(task: Task, real_dir: str) -> None:
    rows = load_split(task, "train", real_dir)
    assert {render(task, row).gold for row in rows} >= set(range(len(task.answers)))


def test_the_paper_scores_every_fortieth_pair(real_dir: str) -> None:
    every, scored = (
        load_split(TASKS[name], "validation", real_dir)["question1"]
        for name in ("qqp_gen", "qqp_paper")
    )
    assert list(scored) == list(every)[::40]


def test_the_papers_mnli_needs_both_halves(real_dir: str) -> None:
    with pytest.raises(DataError, match=r"validation_mismatched\.parquet does not exist"):
        load_split(TASKS["mnli_paper"], TASKS["mnli_paper"].eval_split, real_dir)


def test_hidden_labels_are_refused(real_dir: str) -> None:
    with pytest.raises(DataError, match="no label in 1140 of its 1140 rows"):
        load_split(TASKS["commonsenseqa"], "test", real_dir)


def test_all_tasks_are_scored(real_dir: str) -> None:
    report = evaluate_model(tiny_llama(), tiny_tokenizer(), ["text"], data_dir=real_dir, limit=20)
    assert [measured.n for measured in report.tasks.values()] == [20] * 13
    assert abs(report.groups["text"].metrics["model"]["score"].value) < 0.6  # it knows nothing


def test_all_tasks_are_answered_in_writing(real_dir: str) -> None:
    report = evaluate_model(
        tiny_llama(), tiny_tokenizer(), ["text_gen"], data_dir=real_dir, limit=5
    )
    assert [measured.n for measured in report.tasks.values()] == [5] * 13
    for measured in report.tasks.values():  # a random model writes no sentence
        assert measured.metrics["model"]["parsed"].value == 0
        assert measured.metrics["model"]["score"].value == 0
