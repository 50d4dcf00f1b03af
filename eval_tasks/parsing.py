"""Finding the answer in a text that a model has written."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from functools import cache

from .task import Task
from .vmcbench.answers import find_letter

MISS = -1  # the prediction where no answer was found; it equals no label

Parser = Callable[[Task, str, tuple[str, ...]], int]


def parse_template(task: Task, text: str, options: tuple[str, ...]) -> int:
    """The answer that stands in `text` in the form of `task.answer`, if there is exactly one.

    As the paper's code does: none and several both count as a miss, and the answer's last full stop
    need not be there. A letter that the row has no option for is a miss too, and so is the
    beginning of a longer word, which the paper's code takes ("The answer is Apples" for A).

    Args:
        task: an entry of the catalog.
        text: what the model wrote.
        options: texts of the row's options; empty where the answers are words.

    Returns:
        Index of the answer, or MISS.
    """
    found = _pattern(task).findall(text)
    known = tuple(string.ascii_uppercase[: len(options)]) if options else task.answers
    return known.index(found[0]) if len(found) == 1 and found[0] in known else MISS


@cache
def _pattern(task: Task) -> re.Pattern[str]:
    """`task.answer` with any of the answers in its place."""
    before, _, after = task.answer.partition("{}")
    answer = "|".join(map(re.escape, task.answers)) or "[A-Z]"
    return re.compile(rf"{re.escape(before)}({answer}){re.escape(after.removesuffix('.'))}\b")


def parse_vmcbench(task: Task, text: str, options: tuple[str, ...]) -> int:
    """The answer as VMCBench's official code finds it, or MISS where that code guesses."""
    del task
    found = find_letter(text, options)
    return MISS if found is None else found


PARSERS: dict[str, Parser] = {"template": parse_template, "vmcbench": parse_vmcbench}
