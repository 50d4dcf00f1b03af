"""What a row looks like."""

from __future__ import annotations

from pathlib import Path

import pytest
from task_rows import ROWS

from moelora_eval_tasks.catalog import TASKS
from moelora_eval_tasks.prompts import render
from moelora_plugin.errors import DataError

GOLDEN = Path(__file__).with_name("golden_prompts.txt")


def test_the_first_row_of_every_task_is_shown_as_in_the_golden_file() -> None:
    shown = []
    for name, task in TASKS.items():
        prompt = render(task, ROWS[name][0])
        choices = "|".join(prompt.choices)
        shown.append(f"===== {name}\n{prompt.context}[{choices}] gold {prompt.gold}\n")
    assert "".join(shown) == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TASKS)
def test_white_space_lies_at_the_start_of_the_choice(name: str) -> None:
    for row in ROWS[name]:
        prompt = render(TASKS[name], row)
        assert prompt.context == prompt.context.rstrip()
        assert all(c[0] == " " and c[1:] == c[1:].strip() for c in prompt.choices)
        assert len(set(prompt.choices)) == len(prompt.choices)


def test_an_empty_text_is_shown_as_not_available() -> None:
    row = ROWS["scienceqa"][0] | {"hint": None}
    assert "Context: N/A\n" in render(TASKS["scienceqa"], row).context


@pytest.mark.parametrize(("label", "gold"), [(0.0, 0), (0.49, 0), (2.5, 3), (4.4, 4), (5.0, 5)])
def test_a_rating_is_rounded_halves_up(label: float, gold: int) -> None:
    assert render(TASKS["stsb"], ROWS["stsb"][0] | {"label": label}).gold == gold


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("sst2", {"label": 2}, "Label 2 in column 'label' of sst2: expected 0, 1"),
        ("stsb", {"label": 5.1}, "Label 5.1 in column 'label' of stsb: expected 0, 1, 2, 3, 4, 5"),
        ("stsb", {"label": float("nan")}, "Label nan"),
        ("openbookqa", {"answerKey": "E"}, "expected 'A', 'B', 'C', 'D'"),
        ("siqa", {"label": 1}, "Label 1 in column 'label' of siqa: expected '1', '2', '3'"),
        ("scienceqa", {"answer": 2}, "expected 0, 1"),
    ],
)
def test_an_unknown_label_is_refused(name: str, change: dict, said: str) -> None:
    with pytest.raises(DataError, match=said):
        render(TASKS[name], ROWS[name][0] | change)
