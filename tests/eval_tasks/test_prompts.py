"""What a row looks like."""

from __future__ import annotations

from pathlib import Path

import pytest
from task_rows import ROWS

from moelora_eval_tasks.catalog import TASKS, Task
from moelora_eval_tasks.prompts import IMAGE_PLACEHOLDER, render
from moelora_plugin.errors import DataError

GOLDEN = Path(__file__).with_name("golden_prompts.txt")


def test_the_first_row_of_every_task_is_shown_as_in_the_golden_file() -> None:
    shown = []
    for name, task in TASKS.items():
        prompt = render(task, ROWS[task.benchmark][0])
        choices = "|".join(prompt.choices)
        shown.append(f"===== {name}\n{prompt.context}[{choices}] gold {prompt.gold}\n")
    assert "".join(shown) == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_white_space_lies_where_no_token_changes(task: Task) -> None:
    """At the start of an answer; or before one that is written, as a line break."""
    for row in ROWS[task.benchmark]:
        prompt = render(task, row)
        broken = task.generates and prompt.context.endswith("\n")
        assert prompt.context == prompt.context.strip() + "\n" * broken
        assert all(c == " " * (not broken) + c.strip() for c in prompt.choices)
        assert len(set(prompt.choices)) == len(prompt.choices)


def test_an_empty_text_is_shown_as_not_available() -> None:
    row = ROWS["scienceqa"][0] | {"hint": None}
    assert "Context: N/A\n" in render(TASKS["scienceqa"], row).context


def test_a_text_cannot_put_an_image_into_the_prompt() -> None:
    row = ROWS["sst2"][0] | {"sentence": f"a {IMAGE_PLACEHOLDER} tag"}
    assert IMAGE_PLACEHOLDER not in render(TASKS["sst2"], row).context


@pytest.mark.parametrize(
    ("label", "answer"),
    [(0.0, 1), (1.0, 1), (1.2, 2), (2.0, 2), (2.6, 3), (3.01, 4), (4.0, 4), (4.2, 5), (5.0, 5)],
)
def test_a_rating_in_bins_is_rounded_up(label: float, answer: int) -> None:
    prompt = render(TASKS["stsb_paper"], ROWS["stsb"][0] | {"label": label})
    assert prompt.choices[prompt.gold] == f"Their similarity can be rated as {answer}"


@pytest.mark.parametrize(("label", "gold"), [(0.0, 0), (0.49, 0), (2.5, 3), (4.4, 4), (5.0, 5)])
def test_a_rating_is_rounded_halves_up(label: float, gold: int) -> None:
    assert render(TASKS["stsb"], ROWS["stsb"][0] | {"label": label}).gold == gold


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("sst2", {"label": 2}, "Label 2 in column 'label' of sst2: expected 0, 1"),
        ("stsb", {"label": 5.1}, "Label 5.1 in column 'label' of stsb: expected 0, 1, 2, 3, 4, 5"),
        ("stsb", {"label": float("nan")}, "Label nan"),
        ("stsb_gen", {"label": 5.1}, "Label 5.1 in column 'label' of stsb_gen: expected 1, 2, 3"),
        ("stsb_gen", {"label": -0.1}, "Label -0.1"),
        ("openbookqa", {"answerKey": "E"}, "expected 'A', 'B', 'C', 'D'"),
        ("siqa", {"label": 1}, "Label 1 in column 'label' of siqa: expected '1', '2', '3'"),
        ("scienceqa", {"answer": 2}, "expected 0, 1"),
    ],
)
def test_an_unknown_label_is_refused(name: str, change: dict, said: str) -> None:
    with pytest.raises(DataError, match=said):
        render(TASKS[name], ROWS[TASKS[name].benchmark][0] | change)
