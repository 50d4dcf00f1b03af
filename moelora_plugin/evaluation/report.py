"""The outcome of an evaluation: as values, as a table and as a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelora_eval_tasks.catalog import TASKS
from moelora_eval_tasks.scoring import SCORE
from moelora_eval_tasks.task import PARSED

from ..files import check_out_file, whole_file
from ..reading import read_json
from ..text import plain
from .documents import (
    Document,
    documents_file,
    documents_of,
    holds_documents,
    write_documents,
)
from .expert_use import ExpertUse
from .harness import Predictions
from .overlap import overlap_warnings
from .statistics import Difference, Estimate, Measurement, noise_warning

if TYPE_CHECKING:
    from ..tables import PlainTable

FORMAT_VERSION = 2
EVALUATION_BYTES = 2**30  # of the JSON: tens of millions of predictions
NOISE_MARK = "~"  # before a difference that is within noise
_LONG = ("predictions", "expert_use")


@dataclass(frozen=True)
class EvaluationReport:
    """Scores of one run.

    Attributes:
        tasks: what the models came out at on each task, in the order asked for.
        groups: likewise on each group that was asked for: the unweighted mean of its tasks.
        predictions: by model and task what was answered to each row.
        reference: the model that the others are compared with; None compares nothing.
        models: by model what is known of it (base, adapter, digests, routing).
        details: everything else that is needed to repeat the run.
        documents: gives the rows of a task as they were rendered; None writes none.
        path: the file it was written to.
    """

    tasks: dict[str, Measurement]
    groups: dict[str, Measurement]
    predictions: dict[str, dict[str, Predictions]] = field(repr=False)
    reference: str | None = None
    models: dict[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    details: dict[str, Any] = field(default_factory=dict, repr=False)
    documents: Callable[[str], Sequence[Mapping[str, Any]]] | None = field(default=None, repr=False)
    path: Path | None = None

    @property
    def warnings(self) -> list[str]:
        """What must be known before the scores are quoted, a sentence each."""
        return cautions(self.tasks, self.groups, self.details)

    def table(self) -> PlainTable:
        """A table for the terminal, in points (times 100), with the warnings under it."""
        from rich.box import SIMPLE_HEAD

        from ..tables import PlainTable, shown

        compared = self.reference is not None
        title = "Scores x 100 ± standard error"
        if compared:
            title += f"; difference from {self.reference} [95 %], {NOISE_MARK} within noise"
        # Narrow enough for 80 columns: a number that wraps is hard to read, a name is not.
        table = PlainTable(
            title=title,
            caption=shown("\n".join(map(plain, self.warnings)), "table.caption"),
            caption_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        table.add_column("Task", overflow="fold")
        table.add_column("Rows", justify="right", no_wrap=True)
        table.add_column("Metric", no_wrap=True)
        if len(self.predictions) > 1:
            table.add_column("Model", overflow="fold")
        table.add_column("Value", justify="right", no_wrap=True)
        if compared:
            table.add_column("Difference", justify="right", no_wrap=True)
        for name, measurement in self.tasks.items():
            _add_rows(table, name, measurement)
        for name, measurement in self.groups.items():
            table.add_section()
            _add_rows(table, f"{name} (mean)", measurement)
        return table

    def to_dict(self) -> dict[str, Any]:
        """The content of `moelora_eval.json`."""
        return {
            "format_version": FORMAT_VERSION,
            "models": self.models,
            "reference": self.reference,
            "tasks": {name: one.to_dict() for name, one in self.tasks.items()},
            "groups": {name: one.to_dict() for name, one in self.groups.items()},
            **self.details,
            "expert_use": self._expert_use(),
            "predictions": {name: self._rows(name) for name in self.tasks},
        }

    def write(self, path: Path) -> EvaluationReport:
        """Write the JSON file and, beside it, the documents; both whole or not at all.

        Those of another run are replaced.

        Returns:
            This report, with its `path`.

        Raises:
            ConfigError: a file that is in the way is not of a run.
        """
        file = documents_file(path)
        check_out_file(path, overwrite=True, is_ours=holds_evaluation, key="path")
        check_out_file(file, overwrite=True, is_ours=holds_documents, key="path")
        with whole_file(path) as temporary:
            if self.documents is None:
                _write_json(temporary, self.to_dict())
                return replace(self, path=path)
            with whole_file(file) as beside:
                documents = self._documents(self.documents)
                digest = write_documents(beside, documents, list(self.predictions))
                record = {"documents": {"file": file.name, "sha256": digest}}
                _write_json(temporary, {**self.to_dict(), **record})
        return replace(self, path=path)

    def _documents(self, rows: Callable[[str], Any]) -> Iterator[Document]:
        for name in self.tasks:
            answered = {model: found[name] for model, found in self.predictions.items()}
            yield from documents_of(TASKS[name], rows(name), answered)

    def _expert_use(self) -> dict[str, dict[str, ExpertUse]]:
        """By model and task; without the models that have no experts."""
        used = {
            model: {task: one.expert_use for task, one in found.items() if one.expert_use}
            for model, found in self.predictions.items()
        }
        return {model: by_task for model, by_task in used.items() if by_task}

    def _rows(self, task: str) -> dict[str, Any]:
        """What each model predicted on each row, beside the labels."""
        by_model = {model: found[task] for model, found in self.predictions.items()}
        first = next(iter(by_model.values()))
        return {
            "prompts_sha256": first.prompts_sha256,
            "label": first.label.tolist(),
            "models": {model: one.pred.tolist() for model, one in by_model.items()},
        }


def holds_evaluation(path: Path) -> bool:
    """Whether a file is the JSON of an evaluation, of any version.

    Raises:
        ConfigError: it holds no JSON.
    """
    content = read_json(path, remedy="run `moelora eval` again", most=EVALUATION_BYTES)
    return {"format_version", "tasks"} <= content.keys()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    parts = (
        # Predictions and expert use are long lists: indented, they would be a number to a line.
        f'"{key}": {json.dumps(value, indent=None if key in _LONG else 2)}'
        for key, value in content.items()
    )
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def cautions(
    tasks: Mapping[str, Measurement],
    groups: Mapping[str, Measurement],
    details: Mapping[str, Any],
) -> list[str]:
    """What must be known before the scores of a run are quoted, a sentence each."""
    found = []
    if limit := details.get("request", {}).get("limit"):
        found.append(
            f"At most {limit} rows of each task were drawn (--limit): not the benchmarks' scores."
        )
    found += overlap_warnings(details.get("overlap", {}))
    if noise := noise_warning(tasks, groups):
        found.append(noise)
    return found


def _add_rows(table: PlainTable, name: str, one: Measurement) -> None:
    """A row per metric and model."""
    for model, estimates in one.metrics.items():
        metrics = shown_metrics(estimates)
        for metric in metrics:
            first = metric == metrics[0] and model == next(iter(one.metrics))
            cells = [name if first else "", str(one.n) if first else "", metric]
            if len(one.metrics) > 1:
                cells.append(model)
            cells.append(show_estimate(estimates[metric]))
            if one.differences:
                shown = model in one.differences and metric == metrics[-1]
                cells.append(show_difference(one.differences[model]) if shown else "")
            table.add_row(*cells)


def show_estimate(estimate: Estimate) -> str:
    """In points, with the standard error."""
    return f"{100 * estimate.value:.2f} ± {100 * estimate.stderr:.2f}"


def show_difference(difference: Difference) -> str:
    """In points, with the 95 % interval, and a mark where that holds 0."""
    mark = f"{NOISE_MARK} " if difference.within_noise else ""
    low, high = difference.interval
    return f"{mark}{100 * difference.value:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def shown_metrics(estimates: Mapping[str, Estimate]) -> list[str]:
    """The metrics to show, the score last. One that is the score by itself stands for it."""
    unscored = [metric for metric in estimates if metric == PARSED]
    scored = [metric for metric in estimates if metric not in (PARSED, SCORE)]
    return [*unscored, *scored] if len(scored) == 1 else [*unscored, *scored, SCORE]
