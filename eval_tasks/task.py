"""What a text task is: data, not code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Task:
    """One text task.

    A row is shown as its `inputs`, then its options (lettered) if it has any. The answer is a
    letter where there are `options`, else one of `answers`, the words for `labels` in that order.

    Attributes:
        name: short name, as in `--tasks`.
        summary: one line for `moelora tasks`.
        hub_id: dataset on the hub.
        config: its configuration there.
        revision: its pinned commit there, or "main" where none is pinned yet.
        folder: folder in a `--data-dir`, which holds one `<split>.parquet` per split.
        eval_split: labelled split that the task is scored on; "train" is what it is trained on.
        eval_rows: official number of rows of `eval_split`.
        instruction: what the model is asked to do.
        inputs: (title, column) of each text shown, in order.
        stem: the beginning of the answer, which the prompt ends with.
        label: column of the label.
        labels: the values it may have; empty where each row brings its own list of options.
        answers: the words for `labels`.
        options: columns with the texts of the options: one that lists them all, or one for each.
        rating: the label is a real number between the first and the last of `labels`.
        metrics: official metrics, keys of `metrics.METRICS`; their mean is the task's score.
        image: column with an image; rows that have one are left out.
        spellings: other names that the task goes by.
    """

    name: str
    summary: str
    hub_id: str
    config: str | None = None
    revision: str
    folder: str
    eval_split: str = "validation"
    eval_rows: int
    instruction: str = "Choose the option that answers the question."
    inputs: tuple[tuple[str, str], ...]
    stem: str = "The correct answer is"
    label: str = "label"
    labels: tuple[int | str, ...] = ()
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    rating: bool = False
    metrics: tuple[str, ...] = ("acc",)
    image: str | None = None
    spellings: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that rendering a row needs."""
        return (*(column for _, column in self.inputs), *self.options, self.label)
