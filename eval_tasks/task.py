"""What a task is: data, not code."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Protocol = Literal["loglikelihood", "generation", "paper"]
SUFFIXES: dict[Protocol, str] = {"loglikelihood": "", "generation": "_gen", "paper": "_paper"}
PARSED = "parsed"  # the share of written answers that were found: a metric, but no score

INSTRUCTION_TEMPLATE = (
    "{image}### Instruction:\n{instruction}\n\n### Input:\n{body}\n\n### Response:\n{stem}"
)

# For questions with options whose answer is written: the layout in which the paper's code shows
# ScienceQA, in our own words.
QUESTION_TEMPLATE = (
    "{image}{instruction}\n\n### Instruction:\n{inputs}\nOptions: {options_line}\n\n### Response:\n"
)

# For questions about an image whose answer is written: the paper's code's, which is LLaVA-1.5's.
VISUAL_TEMPLATE = "USER: {image}{question}\n{options}\n\nASSISTANT:"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One benchmark under one protocol.

    A row is shown as its `inputs`, then its options (lettered) if it has any. The answer is a
    letter where there are `options`, else one of `answers`, the words for `labels` in that order.

    Attributes:
        benchmark: short name of the benchmark; with the protocol's suffix, the name in `--tasks`.
        protocol: "loglikelihood" (the likeliest of the answers), "generation" (the answer is
            written and must be found in the text) or "paper" (that on the paper's own rows and
            with its own metric).
        summary: one line for `moelora tasks`.
        hub_id: dataset on the hub; None where `moelora data prepare` makes the files.
        config: its configuration there.
        revision: its pinned commit there, or "main" where none is pinned yet.
        folder: folder in a `--data-dir`, which holds one `<split>.parquet` per split.
        parts: tasks whose rows are pooled, in that order, in place of rows of an own dataset.
        renamed: (column on the hub, column here) where another copy of a dataset names it
            differently.
        train_split: labelled split that is trained on; None where all labelled rows are scored.
        eval_split: labelled split that the task is scored on.
        eval_rows: official number of rows that are scored.
        train_slice: which rows of `train_split` are trained on, as in Python: ":900".
        eval_slice: which rows of `eval_split` are scored: "::40".
        template: the prompt; `{inputs}` are the titled texts, `{options}` the options on a line
            each and `{options_line}` on one, `{body}` inputs and options, `{image}` the place of an
            image, `{instruction}` and `{stem}` fields of this class, any other name a column.
        instruction: what the model is asked to do.
        inputs: (title, column) of each text shown, in order.
        option: how an option is shown.
        stem: the beginning of the answer, which the prompt of a log-likelihood task ends with.
        preface: what a generation task has written before the answer, and need not be found.
        answer: the answer as a generation task has it written, `{}` being letter or word.
        parser: how an answer is found in what was written, a key of `parsing.PARSERS`.
        max_new_tokens: how much is written.
        label: column of the label.
        labels: the values it may have; empty where each row brings its own list of options.
        answers: the words for `labels`.
        options: columns with the texts of the options: one that lists them all, or one for each.
        shuffle_by: column whose value seeds the order in which a row's options are shown; None
            shows them as they come.
        rating: the label is a real number between the first and the last of `labels`: "mean"
            predicts a real number too, "bin" the whole number that the label is rounded up to.
        metrics: keys of `metrics.METRICS`; the mean of all but "parsed" is the task's score.
        image: column with an image.
        image_rows: whether the task has the rows "with" or "without" an image.
        category: column by whose values the scores are broken down too.
        categories: (value of that column, category it belongs to); empty takes the values.
        spellings: other names that the task goes by.
    """

    benchmark: str
    protocol: Protocol = "loglikelihood"
    summary: str
    hub_id: str | None
    config: str | None = None
    revision: str
    folder: str
    parts: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    train_split: str | None = "train"
    eval_split: str = "validation"
    eval_rows: int
    train_slice: str = ":"
    eval_slice: str = ":"
    template: str = INSTRUCTION_TEMPLATE
    instruction: str = "Choose the option that answers the question."
    inputs: tuple[tuple[str, str], ...]
    option: str = "({letter}) {text}"
    stem: str = "The correct answer is"
    preface: str = ""
    answer: str = "The correct answer is {}."
    parser: str = "template"
    max_new_tokens: int = 10
    label: str = "label"
    labels: tuple[int | str, ...] = ()
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    shuffle_by: str | None = None
    rating: Literal["mean", "bin"] | None = None
    metrics: tuple[str, ...] = ("acc",)
    image: str | None = None
    image_rows: Literal["with", "without"] = "with"
    category: str | None = None
    categories: tuple[tuple[str, str], ...] = ()
    spellings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As in `--tasks`: "sst2", "sst2_gen", "sst2_paper"."""
        return self.benchmark + SUFFIXES[self.protocol]

    @property
    def generates(self) -> bool:
        """Whether the answer is written, not chosen."""
        return self.protocol != "loglikelihood"

    @property
    def scored(self) -> tuple[str, ...]:
        """The metrics whose mean is the score."""
        return tuple(name for name in self.metrics if name != PARSED)

    @property
    def shows_images(self) -> bool:
        """Whether rows may come with an image, which only a vision model can be shown."""
        return self.image is not None and self.image_rows == "with"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that rendering and scoring a row need."""
        extra = (self.image if self.shows_images else None, self.category, self.shuffle_by)
        named = (*(column for _, column in self.inputs), *self.options, self.label)
        return tuple(dict.fromkeys((*named, *(column for column in extra if column))))


def generated(task: Task, **changes: Any) -> Task:
    """`task` under the protocol "generation": accuracy, and the share of answers found.

    Unless `changes` say otherwise, the answer is the stem made a sentence.
    """
    kept = {"protocol": "generation", "answer": f"{task.stem} {{}}.", "metrics": ("acc", PARSED)}
    return replace(task, **(kept | changes))


def as_in_paper(task: Task, **changes: Any) -> Task:
    """A generation task on the paper's own rows and with its own metric."""
    return replace(task, protocol="paper", **changes)
