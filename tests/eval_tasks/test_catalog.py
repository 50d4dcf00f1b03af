"""Names of tasks and groups."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moelora_eval_tasks.catalog import GROUPS, TASKS, canonical, resolve
from moelora_eval_tasks.metrics import METRICS
from moelora_eval_tasks.parsing import PARSERS
from moelora_plugin.errors import ConfigError


def test_the_groups_are_glue_the_questions_and_both() -> None:
    assert len(GROUPS["glue"]) == 9
    assert GROUPS["text"] == GROUPS["qa"] + GROUPS["glue"]
    assert "mnli_mismatched" not in GROUPS["text"]


@pytest.mark.parametrize("family", ["qa", "glue", "text"])
def test_a_group_goes_with_each_protocol(family: str) -> None:
    paper = "paper" if family == "text" else f"{family}_paper"
    assert GROUPS[f"{family}_gen"] == tuple(f"{name}_gen" for name in GROUPS[family])
    assert GROUPS[paper] == tuple(f"{name}_paper" for name in GROUPS[family])
    for group in (family, f"{family}_gen", paper):
        assert all(not TASKS[name].shows_images for name in GROUPS[group])


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("sst2", "sst2"),
        ("SST-2", "sst2"),
        ("glue_sst2", "sst2"),
        ("moelora_sst2", "sst2"),
        ("sts-b", "stsb"),
        ("commonsense_qa", "commonsenseqa"),
        ("social_iqa", "siqa"),
        ("social_i_qa", "siqa"),
        ("ScienceQA", "scienceqa"),
        ("mnli-mm", "mnli_mismatched"),
        ("glue_mnli", "mnli"),
        ("SST-2_gen", "sst2_gen"),
        ("social_iqa_paper", "siqa_paper"),
        ("glue_mnli_gen", "mnli_gen"),
        ("moelora_paper", "paper"),
        ("GLUE", "glue"),
        ("all", "text"),
    ],
)
def test_common_spellings_are_understood(spelling: str, name: str) -> None:
    assert canonical(spelling) == name


def test_resolve_opens_groups_and_names_each_task_once() -> None:
    assert [task.name for task in resolve(["rte", "qa", "glue", "rte"])] == [
        "rte",
        *GROUPS["qa"],
        *(name for name in GROUPS["glue"] if name != "rte"),
    ]


def test_an_unknown_task_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Unknown task 'sst3'; did you mean 'sst2'"):
        resolve(["sst3"])


def test_no_task_is_answered_with_all() -> None:
    with pytest.raises(ConfigError, match=r"No task is given; .*`moelora tasks`"):
        resolve([])


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_every_entry_is_complete(task) -> None:
    assert len(task.answers) in (0, len(task.labels))
    assert bool(task.answers) != bool(task.options)
    assert set(task.metrics) <= set(METRICS)
    assert task.parser in PARSERS
    assert ("parsed" in task.metrics) == task.generates
    assert not (task.generates and task.rating == "mean")  # a real number is never written
    assert all(TASKS[part].protocol == "loglikelihood" for part in task.parts)
    assert task.revision == "main" or len(task.revision) == 40  # the hub wants full hashes


def test_listing_tasks_loads_nothing() -> None:
    code = (
        "import sys, moelora_eval_tasks.catalog; "
        "print([m for m in ('torch', 'datasets', 'numpy', 'peft') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
