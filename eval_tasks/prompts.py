"""The one place where a row becomes text: training and evaluation both call `render`.

The layout of a log-likelihood task follows the reference implementation's (instruction header, the
row's texts, a response marker, the beginning of the answer), in our own words:

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

The prompt of a generation task ends before the answer, which is a sentence ("The correct answer is
A."). Nothing is moved there, so it may end with a line break.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moelora_plugin.errors import DataError

from .task import Task

IMAGE_PLACEHOLDER = "<image>"  # lm-eval's; a model's processor has a token of its own for it


@dataclass(frozen=True)
class Prompt:
    """A row as text.

    Attributes:
        context: the prompt; `IMAGE_PLACEHOLDER` stands where the row's image goes.
        choices: the possible answers, which continue the context.
        gold: index of the right one. For a rating, of the whole number it is rounded to.
        options: texts of the options in the order shown; empty where the answers are words.
    """

    context: str
    choices: tuple[str, ...]
    gold: int
    options: tuple[str, ...] = ()


def render(task: Task, doc: Mapping[str, Any]) -> Prompt:
    """Show one row of `task`.

    Args:
        task: an entry of the catalog.
        doc: a row with the columns `task.columns`.

    Raises:
        DataError: the row's label is not one of those the task (or the row's options) has.
    """
    texts, _ = _options(task, doc)
    letters = string.ascii_uppercase[: len(texts)]
    listed = [
        task.option.format(letter=letter, text=text)
        for letter, text in zip(letters, texts, strict=True)
    ]
    values = {column: _text(doc[column]) for _, column in task.inputs}
    inputs = [f"{title}: {values[column]}" for title, column in task.inputs]
    has_image = task.shows_images and doc[str(task.image)] is not None
    context = task.template.format_map(
        values
        | {
            "image": f"{IMAGE_PLACEHOLDER}\n" if has_image else "",
            "instruction": task.instruction,
            "inputs": "\n".join(inputs),
            "options": "\n".join(listed),
            "options_line": " ".join(listed),
            "body": "\n".join(inputs + listed),
            "stem": task.stem,
        }
    )
    form = task.preface + task.answer if task.generates else " {}"
    choices = tuple(form.format(answer) for answer in task.answers or letters)
    return Prompt(context, choices, gold(task, doc), texts)


def gold(task: Task, doc: Mapping[str, Any]) -> int:
    """Index of the right answer of one row, in the order in which the answers are shown.

    A rating is rounded to the nearest whole number, halves up, or in bins upwards: the paper's
    code has 1 for all up to 1, 2 for all up to 2, and so on.

    Raises:
        DataError: the row's label is not one of those the task (or the row's options) has.
    """
    label = doc[task.label]
    _, labels = _options(task, doc)
    if task.rating == "mean" and labels[0] <= label <= labels[-1]:
        return labels.index(math.floor(label + 0.5))
    if task.rating == "bin" and 0 <= label <= labels[-1]:
        return labels.index(max(math.ceil(label), labels[0]))
    if label not in labels:
        known = ", ".join(map(repr, sorted(labels)))
        raise DataError(
            f"Label {label!r} in column {task.label!r} of {task.name}: expected {known}."
        )
    return labels.index(label)


def _text(value: Any) -> str:
    """A column's text; one that holds the placeholder of an image must not become an image."""
    text = str(value or "").strip() or "N/A"
    return text.replace(IMAGE_PLACEHOLDER, "(image)")


def _options(task: Task, doc: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """The texts of a row's options (none where the answers are words) and the labels they go by."""
    if not task.options:
        return (), task.labels
    if len(task.options) > 1:
        texts, labels = [doc[column] for column in task.options], list(task.labels)
    else:
        listed = doc[task.options[0]]
        if isinstance(listed, Mapping):
            texts, labels = listed["text"], list(listed["label"])
        else:
            texts, labels = listed, list(range(len(listed)))
    order = list(range(len(labels)))
    if task.shuffle_by is not None:
        random.Random(f"{task.benchmark} {doc[task.shuffle_by]}").shuffle(order)
    return tuple(_text(texts[i]) for i in order), tuple(labels[i] for i in order)
