"""The outcome of an evaluation: as values, as a table and as a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelora_eval_tasks.scoring import SCORE

from ..files import write_text
from .harness import Predictions
from .statistics import Estimate, Measurement

if TYPE_CHECKING:
    from rich.table import Table

FORMAT_VERSION = 1


@dataclass(frozen=True)
class EvaluationReport:
    """Scores of one run.

    Attributes:
        tasks: what each task came out at, in the order asked for.
        groups: what each group that was asked for came out at: the unweighted mean of its tasks.
        predictions: per-row labels and predictions of the model evaluated, by task.
        base_predictions: the base's, where it was compared.
        details: everything else that is needed to repeat the run.
        path: the file it was written to.
    """

    tasks: dict[str, Measurement]
    groups: dict[str, Measurement]
    predictions: dict[str, Predictions] = field(repr=False)
    base_predictions: dict[str, Predictions] | None = field(default=None, repr=False)
    details: dict[str, Any] = field(default_factory=dict, repr=False)
    path: Path | None = None

    def table(self) -> Table:
        """A table for the terminal, in points (times 100)."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        compared = self.base_predictions is not None
        title = "Scores x 100 ± standard error" + ("; difference [95 %]" if compared else "")
        # Narrow enough for 80 columns: a number that wraps is hard to read.
        table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("Task", overflow="fold")
        for name in ("Rows", "Metric", *(("Base", "Adapter") if compared else ("Value",))):
            table.add_column(name, justify="left" if name == "Metric" else "right", no_wrap=True)
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
            "tasks": {name: one.to_dict() for name, one in self.tasks.items()},
            "groups": {name: one.to_dict() for name, one in self.groups.items()},
            **self.details,
            "predictions": {name: self._rows(name) for name in self.predictions},
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

    def _rows(self, name: str) -> dict[str, Any]:
        one = self.predictions[name]
        rows: dict[str, Any] = {
            "prompts_sha256": one.prompts_sha256,
            "label": one.label.tolist(),
            "model": one.pred.tolist(),
        }
        if self.base_predictions is not None:
            rows["base"] = self.base_predictions[name].pred.tolist()
        return rows


def _add_rows(table: Table, name: str, one: Measurement) -> None:
    """A row per metric. A task with a single metric has it for its score, so that is one row."""
    official = [metric for metric in one.metrics if metric != SCORE]
    metrics = official if len(official) == 1 else [*official, SCORE]
    for metric in metrics:
        first = metric == metrics[0]
        cells = [name if first else "", str(one.n) if first else "", metric]
        if one.base is not None and one.difference is not None:
            cells += [_show(one.base[metric]), _show(one.metrics[metric])]
            low, high = one.difference.interval
            shown = f"{100 * one.difference.value:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
            cells.append(shown if metric == metrics[-1] else "")
        else:
            cells.append(_show(one.metrics[metric]))
        table.add_row(*cells)


def _show(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.2f} ± {100 * estimate.stderr:.2f}"
