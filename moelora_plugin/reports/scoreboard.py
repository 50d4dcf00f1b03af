"""The scores of one run, or of several as one table, for the page and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..evaluation.report import cautions
from ..evaluation.statistics import Measurement
from .compare import compare, mcnemar_p_values
from .runs import Run


@dataclass(frozen=True)
class Scoreboard:
    """Models that were scored on the same rows.

    Attributes:
        runs: the runs by name.
        models: by the model's name on the board its run and its name there.
        reference: the model that the others are compared with; None compares nothing.
        tasks: what the models came out at on each task.
        groups: likewise on each group of tasks.
        warnings: what must be known before the scores are quoted, a sentence each.
    """

    runs: dict[str, Run]
    models: dict[str, tuple[Run, str]]
    reference: str | None
    tasks: dict[str, Measurement]
    groups: dict[str, Measurement]
    warnings: list[str]

    @property
    def p_values(self) -> dict[tuple[str, str], float]:
        """By task and model McNemar's p, adjusted after Holm for all that are on the board."""
        return mcnemar_p_values(self.tasks)


def scoreboard(runs: Mapping[str, Run]) -> Scoreboard:
    """Put the models of runs beside each other.

    Several runs are compared as `moelora compare` does, with one reference; see `compare`.

    Raises:
        ConfigError: several runs that were not scored on the same rows.
    """
    if len(runs) == 1:
        (run,) = runs.values()
        models = {model: (run, model) for model in next(iter(run.predictions.values())).preds}
        warnings = cautions(run.tasks, run.groups, run.details)
        return Scoreboard(dict(runs), models, run.reference, run.tasks, run.groups, warnings)
    compared = compare(runs)
    return Scoreboard(
        dict(runs),
        compared.models,
        compared.reference,
        compared.tasks,
        compared.groups,
        compared.warnings,
    )
