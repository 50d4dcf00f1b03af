"""The one place where a row becomes text: training and evaluation both call `render`.

The layout follows the reference implementation's (instruction header, the row's texts, a response
marker, the beginning of the answer), in our own words:

    ### Instruction:
    Choose the option that answers the question.

    ### Input:
    Question: Which of these melts first?
    (A) ice
    (B) iron

    ### Response:
    The correct answer is

and the answer " A". Two rules keep the tokens that are scored the same as those that were trained:

* The context ends without white space and each choice begins with its space. lm-eval moves white
  space at the end of a context into the continuation, which changes the tokens around it.
* The context holds the beginning of the answer, so most answers are one token, and lm-eval scores
  all one-token choices of a row in a single forward pass.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moelora_plugin.errors import DataError

from .task import Task


@dataclass(frozen=True)
class Prompt:
    """A row as text.

    Attributes:
        context: the prompt, ending with the beginning of the answer.
        choices: the possible answers, each with its leading space.
        gold: index of the right one. For a rating, of the nearest whole number.
    """

    context: str
    choices: tuple[str, ...]
    gold: int


def render(task: Task, doc: Mapping[str, Any]) -> Prompt:
    """Show one row of `task`.

    Args:
        task: an entry of the catalog.
        doc: a row with the columns `task.columns`.

    Raises:
        DataError: the row's label is not one of those the task (or the row's options) has.
    """
    inputs = [
        f"{title}: {str(doc[column] or '').strip() or 'N/A'}" for title, column in task.inputs
    ]
    texts, _ = _options(task, doc)
    letters = string.ascii_uppercase[: len(texts)]
    listed = [f"({letter}) {text.strip()}" for letter, text in zip(letters, texts, strict=True)]
    body = "\n".join(inputs + listed)
    context = (
        f"### Instruction:\n{task.instruction}\n\n### Input:\n{body}\n\n### Response:\n{task.stem}"
    )
    return Prompt(
        context, tuple(f" {answer}" for answer in task.answers or letters), gold(task, doc)
    )


def gold(task: Task, doc: Mapping[str, Any]) -> int:
    """Index of the right answer of one row.

    A rating is rounded to the nearest whole number, halves up.

    Raises:
        DataError: the row's label is not one of those the task (or the row's options) has.
    """
    label = doc[task.label]
    _, labels = _options(task, doc)
    if task.rating and labels[0] <= label <= labels[-1]:
        return labels.index(math.floor(label + 0.5))
    if label not in labels:
        known = ", ".join(map(repr, labels))
        raise DataError(
            f"Label {label!r} in column {task.label!r} of {task.name}: expected {known}."
        )
    return labels.index(label)


def _options(task: Task, doc: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """The texts of a row's options (none where the answers are words) and the labels they go by."""
    if not task.options:
        return (), task.labels
    if len(task.options) > 1:
        return tuple(doc[column] for column in task.options), task.labels
    listed = doc[task.options[0]]
    if isinstance(listed, Mapping):
        return tuple(listed["text"]), tuple(listed["label"])
    return tuple(listed), tuple(range(len(listed)))
