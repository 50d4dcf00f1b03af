"""Which answer stands in a text that a model has written."""

from __future__ import annotations

import pytest
from task_rows import ROWS

from moelora_eval_tasks.catalog import TASKS, Task
from moelora_eval_tasks.parsing import MISS, PARSERS
from moelora_eval_tasks.prompts import render

WRITTEN = [task for task in TASKS.values() if task.generates]
BY_TEMPLATE = [task for task in WRITTEN if task.parser == "template"]


def parse(name: str, text: str, options: tuple[str, ...] = ()) -> int:
    return PARSERS[TASKS[name].parser](TASKS[name], text, options)


@pytest.mark.parametrize("task", WRITTEN, ids=lambda task: task.name)
def test_every_answer_is_found_as_it_is_trained(task: Task) -> None:
    for row in ROWS[task.benchmark]:
        prompt = render(task, row)
        for index, choice in enumerate(prompt.choices):
            assert parse(task.name, choice, prompt.options) == index


@pytest.mark.parametrize("task", BY_TEMPLATE, ids=lambda task: task.name)
def test_one_answer_counts_and_none_or_two_do_not(task: Task) -> None:
    prompt = render(task, ROWS[task.benchmark][0])
    for index, choice in enumerate(prompt.choices):
        answer = choice.removesuffix(".")
        assert parse(task.name, f"Well. {answer}.\n\n###", prompt.options) == index
        assert parse(task.name, f"{answer}. {answer}.", prompt.options) == MISS
        assert parse(task.name, answer[1:-1], prompt.options) == MISS
        assert parse(task.name, answer.lower(), prompt.options) == MISS
    assert parse(task.name, "", prompt.options) == MISS


@pytest.mark.parametrize(
    ("name", "text", "index"),
    [
        ("scienceqa_gen", "The answer is B.", 1),  # without "Answer: "
        ("scienceqa_gen", "The answer is B", 1),  # cut before its full stop
        ("scienceqa_gen", "The answer is", MISS),
        ("scienceqa_gen", "The answer is C.", MISS),  # the row has two options
        ("scienceqa_gen", "The answer is b.", MISS),
        ("scienceqa_gen", "The answer is Because", MISS),
        (
            "scienceqa_gen",
            "The answer is A. The answer is C.",
            MISS,
        ),  # two, though one is no option
        ("commonsenseqa_gen", "The answer is A.", MISS),  # its sentence is another
        ("mrpc_gen", "They are not equivalent.", 0),
        ("mrpc_gen", "They are equivalently", MISS),
        ("qnli_gen", "The sentence does not contain the answer", 1),
        ("qnli_gen", "The sentence does not contain the", MISS),
        ("sst2_gen", "The author has a positive view", MISS),
        ("stsb_gen", "Their similarity can be rated as 5.0", 4),
        ("stsb_gen", "Their similarity can be rated as 6", MISS),
        ("rte_gen", "The relation is not entailment.", 1),
    ],
)
def test_what_is_an_answer(name: str, text: str, index: int) -> None:
    options = () if TASKS[name].answers else ("steam", "ice")
    assert parse(name, text, options) == index
