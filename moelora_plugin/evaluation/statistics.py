"""Metrics with standard errors, and paired differences with confidence intervals, by bootstrap.

Rows are drawn with replacement, 1,000 times (Efron and Tibshirani, *An Introduction to the
Bootstrap*, 1993, ch. 6 and 13). A standard error is the standard deviation of the metric over the
draws. All models see the same draws, so their differences are paired: rows that both get right
cancel.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moelora_eval_tasks.catalog import Task
from moelora_eval_tasks.metrics import METRICS, Array
from moelora_eval_tasks.scoring import SCORE

DRAWS = 1000
CONFIDENCE = 0.95
_CHUNK = 2**21  # rows drawn at once: bounds memory at some tens of MB, whatever the split's size


@dataclass(frozen=True)
class Estimate:
    """A metric and its standard error."""

    value: float
    stderr: float


@dataclass(frozen=True)
class Difference:
    """A model's score minus the reference's.

    Attributes:
        value: on the rows as they are.
        draws: on each bootstrap draw, (DRAWS,).
    """

    value: float
    draws: Array = field(repr=False, compare=False)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % percentile interval."""
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(self.draws, (tail, 1 - tail))
        return float(low), float(high)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the JSON file."""
        low, high = self.interval
        return {"value": self.value, "low": low, "high": high, "confidence": CONFIDENCE}


@dataclass(frozen=True)
class Measurement:
    """What the models came out at on one task, or on one group of tasks.

    Attributes:
        n: rows.
        metrics: by model the task's metrics and "score", the mean of those that are scored; a
            group has only "score".
        differences: by model its score minus the reference's; empty without a reference.
        categories: the same on the rows of each category, where the task has categories.
    """

    n: int
    metrics: dict[str, dict[str, Estimate]]
    differences: dict[str, Difference] = field(default_factory=dict)
    categories: dict[str, Measurement] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the JSON file."""
        return {
            "n": self.n,
            "metrics": {
                model: {name: vars(estimate) for name, estimate in metrics.items()}
                for model, metrics in self.metrics.items()
            },
            "differences": {model: one.to_dict() for model, one in self.differences.items()},
            "categories": {name: one.to_dict() for name, one in self.categories.items()},
        }


def measure(
    task: Task,
    label: Array,
    preds: Mapping[str, Array],
    reference: str | None = None,
    seed: int = 0,
    categories: Sequence[str] | None = None,
) -> Measurement:
    """Score one task.

    Args:
        task: an entry of the catalog.
        label: labels (n,).
        preds: predictions (n,) on the same rows, by model.
        reference: the model that the others are compared with.
        seed: of the draws; each task draws from its own stream, so that its numbers do not depend
            on which other tasks are run.
        categories: of each row (n,), to break the scores down by.
    """
    drawn = _bootstrap(task, label, preds, seed)
    metrics = {
        model: {
            name: Estimate(float(value), float(drawn[model][name].std(ddof=1)))
            for name, value in _evaluate(task, label, pred).items()
        }
        for model, pred in preds.items()
    }
    differences = {
        model: Difference(
            metrics[model][SCORE].value - metrics[reference][SCORE].value,
            drawn[model][SCORE] - drawn[reference][SCORE],
        )
        for model in preds
        if reference is not None and model != reference
    }
    parts = {}
    if categories is not None:
        of_row = np.asarray(categories)
        for category in dict.fromkeys(categories):
            rows = of_row == category
            chosen = {model: pred[rows] for model, pred in preds.items()}
            parts[category] = measure(task, label[rows], chosen, reference, seed)
    return Measurement(len(label), metrics, differences, parts)


def combine(members: Sequence[Measurement]) -> Measurement:
    """The unweighted mean of the scores of a group's tasks.

    The tasks' rows are independent, so the standard error is sqrt(sum_k stderr_k^2) / K.
    """
    first = members[0]
    return Measurement(
        sum(member.n for member in members),
        {
            model: {SCORE: _mean([member.metrics[model][SCORE] for member in members])}
            for model in first.metrics
        },
        {
            model: Difference(
                float(np.mean([member.differences[model].value for member in members])),
                np.mean([member.differences[model].draws for member in members], axis=0),
            )
            for model in first.differences
        },
    )


def _bootstrap(
    task: Task, label: Array, preds: Mapping[str, Array], seed: int
) -> dict[str, dict[str, Array]]:
    """Every metric on every draw, (DRAWS,), for each model."""
    n = len(label)
    rng = np.random.default_rng([seed, zlib.crc32(task.name.encode())])
    step = max(1, _CHUNK // n)
    chunks: dict[str, list[dict[str, Array]]] = {model: [] for model in preds}
    for start in range(0, DRAWS, step):
        rows = rng.integers(n, size=(min(step, DRAWS - start), n))
        for model, pred in preds.items():
            chunks[model].append(_evaluate(task, label[rows], pred[rows]))
    return {
        model: {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for model, parts in chunks.items()
    }


def _evaluate(task: Task, label: Array, pred: Array) -> dict[str, Array]:
    """The task's metrics and its score over the last axis."""
    values = {name: METRICS[name](label, pred) for name in task.metrics}
    return {**values, SCORE: np.mean([values[name] for name in task.scored], axis=0)}


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    stderr = np.sqrt(np.sum([one.stderr**2 for one in estimates])) / len(estimates)
    return Estimate(float(np.mean([one.value for one in estimates])), float(stderr))
