"""Runs of `moelora eval` with invented predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moelora_eval_tasks.catalog import GROUPS, TASKS
from moelora_plugin.evaluation import EvaluationReport
from moelora_plugin.evaluation.harness import Predictions
from moelora_plugin.evaluation.statistics import combine, measure

ROWS = 120


def write_run(
    folder: Path,
    shares: Mapping[str, float],
    tasks: Sequence[str] = ("sst2", "rte"),
    groups: Sequence[str] = (),
    seed: int = 1,
    rows: int = ROWS,
    prompts: str = "0" * 64,
    details: Mapping[str, Any] | None = None,
) -> Path:
    """Write the run of models that are right in the given share of rows.

    Rows are the same in every run, and so is what "base" predicts; `seed` chooses where the others
    err.
    """
    found: dict[str, dict[str, Predictions]] = {model: {} for model in shares}
    reference = "base" if "base" in shares and len(shares) > 1 else None
    measured = {}
    for index, task in enumerate(tasks):
        label = np.random.default_rng(index).integers(0, 2, rows).astype(float)
        preds = {}
        for number, (model, share) in enumerate(shares.items()):
            errs = np.random.default_rng([index, number, 0 if model == "base" else seed])
            preds[model] = np.where(errs.random(rows) < share, label, 1 - label)
            found[model][task] = Predictions(label, preds[model], ("",) * rows, prompts)
        measured[task] = measure(TASKS[task], label, preds, reference)
    EvaluationReport(
        measured,
        {group: combine([measured[task] for task in GROUPS[group]]) for group in groups},
        found,
        reference,
        {model: {"base": "a/model"} for model in shares},
        dict(details or {}),
    ).write(folder / "moelora_eval.json")
    return folder
