"""The outcome of an evaluation: as values, as a table and as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelora_eval_tasks.scoring import SCORE

from ..files import write_text
from .harness import Predictions
from .statistics import Difference, Estimate, Measurement

if TYPE_CHECKING:
    from rich.table import Table

FORMAT_VERSION = 2


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
        path: the file it was written to.
    """

    tasks: dict[str, Measurement]
    groups: dict[str, Measurement]
    predictions: dict[str, dict[str, Predictions]] = field(repr=False)
    reference: str | None = None
    models: dict[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    details: dict[str, Any] = field(default_factory=dict, repr=False)
    path: Path | None = None

    def table(self) -> Table:
        """A table for the terminal, in points (times 100)."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        compared = self.reference is not None
        title = "Scores x 100 ± standard error" + ("; difference [95 %]" if compared else "")
        # Narrow enough for 80 columns: a number that wraps is hard to read.
        table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("Task", overflow="fold")
        for name in ("Rows", "Metric", *(("Model",) if len(self.predictions) > 1 else ()), "Value"):
            left = name in ("Metric", "Model")
            table.add_column(name, justify="left" if left else "right", no_wrap=True)
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
            "predictions": {name: self._rows(name) for name in self.tasks},
        }

    def write(self, path: Path) -> EvaluationReport:
        """Write the JSON file, whole or not at all.

        Returns:
            This report, with its `path`.
        """
        content = (
            # Predictions are long lists: indented, they would be one number to a line.
            f'"{key}": {json.dumps(value, indent=None if key == "predictions" else 2)}'
            for key, value in self.to_dict().items()
        )
        write_text(path, "{\n" + ",\n".join(content) + "\n}\n")
        return replace(self, path=path)

    def _rows(self, task: str) -> dict[str, Any]:
        """What each model predicted on each row, beside the labels."""
        by_model = {model: found[task] for model, found in self.predictions.items()}
        first = next(iter(by_model.values()))
        return {
            "prompts_sha256": first.prompts_sha256,
            "label": first.label.tolist(),
            "models": {model: one.pred.tolist() for model, one in by_model.items()},
        }


def _add_rows(table: Table, name: str, one: Measurement) -> None:
    """A row per metric and model. A single metric is its task's score, so that is one row."""
    for model, estimates in one.metrics.items():
        official = [metric for metric in estimates if metric != SCORE]
        metrics = official if len(official) == 1 else [*official, SCORE]
        for metric in metrics:
            first = metric == metrics[0] and model == next(iter(one.metrics))
            cells = [name if first else "", str(one.n) if first else "", metric]
            if len(one.metrics) > 1:
                cells.append(model)
            cells.append(_show(estimates[metric]))
            if one.differences:
                shown = model in one.differences and metric == metrics[-1]
                cells.append(_show_difference(one.differences[model]) if shown else "")
            table.add_row(*cells)


def _show(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.2f} ± {100 * estimate.stderr:.2f}"


def _show_difference(difference: Difference) -> str:
    low, high = difference.interval
    return f"{100 * difference.value:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
