"""Metrics with standard errors, and paired differences with confidence intervals, by bootstrap.

Rows are drawn with replacement, 1,000 times (Efron and Tibshirani, *An Introduction to the
Bootstrap*, 1993, ch. 6 and 13). A standard error is the standard deviation of the metric over the
draws. Base and adapter see the same draws, so their difference is paired: rows that both get right
cancel.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
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
    """The adapter's score minus the base's.

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


@dataclass(frozen=True)
class Measurement:
    """What one task, or one group of tasks, came out at.

    Attributes:
        n: rows.
        metrics: the task's official metrics and "score", their mean; a group has only "score".
        base: the same of the base alone, where it was compared.
        difference: score of the adapter minus score of the base, where it was compared.
    """

    n: int
    metrics: dict[str, Estimate]
    base: dict[str, Estimate] | None = None
    difference: Difference | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the JSON file."""
        record: dict[str, Any] = {"n": self.n, "metrics": _records(self.metrics)}
        if self.base is not None and self.difference is not None:
            low, high = self.difference.interval
            record["base"] = _records(self.base)
            record["difference"] = {
                "value": self.difference.value,
                "low": low,
                "high": high,
                "confidence": CONFIDENCE,
            }
        return record


def measure(
    task: Task, label: Array, pred: Array, base_pred: Array | None = None, seed: int = 0
) -> Measurement:
    """Score one task.

    Args:
        task: an entry of the catalog.
        label: labels (n,).
        pred: predictions (n,) of the model.
        base_pred: predictions (n,) of the base on the same rows, to compare with.
        seed: of the draws; each task draws from its own stream, so that its numbers do not depend
            on which other tasks are run.
    """
    preds = [pred] if base_pred is None else [pred, base_pred]
    drawn = _bootstrap(task, label, preds, seed)
    metrics, *base = [
        {
            name: Estimate(float(value), float(draws[name].std(ddof=1)))
            for name, value in _evaluate(task, label, one).items()
        }
        for one, draws in zip(preds, drawn, strict=True)
    ]
    if not base:
        return Measurement(len(label), metrics)
    value = metrics[SCORE].value - base[0][SCORE].value
    difference = Difference(value, drawn[0][SCORE] - drawn[1][SCORE])
    return Measurement(len(label), metrics, base[0], difference)


def combine(members: Sequence[Measurement]) -> Measurement:
    """The unweighted mean of the scores of a group's tasks.

    The tasks' rows are independent, so the standard error is sqrt(sum_k stderr_k^2) / K.
    """
    base = [member.base for member in members if member.base is not None]
    differences = [member.difference for member in members if member.difference is not None]
    n = sum(member.n for member in members)
    metrics = {SCORE: _mean([member.metrics[SCORE] for member in members])}
    if not differences:
        return Measurement(n, metrics)
    difference = Difference(
        float(np.mean([one.value for one in differences])),
        np.mean([one.draws for one in differences], axis=0),
    )
    return Measurement(n, metrics, {SCORE: _mean([one[SCORE] for one in base])}, difference)


def _bootstrap(
    task: Task, label: Array, preds: Sequence[Array], seed: int
) -> list[dict[str, Array]]:
    """Every metric on every draw, (DRAWS,), for each set of predictions."""
    n = len(label)
    rng = np.random.default_rng([seed, zlib.crc32(task.name.encode())])
    step = max(1, _CHUNK // n)
    chunks: list[list[dict[str, Array]]] = [[] for _ in preds]
    for start in range(0, DRAWS, step):
        rows = rng.integers(n, size=(min(step, DRAWS - start), n))
        for chunk, pred in zip(chunks, preds, strict=True):
            chunk.append(_evaluate(task, label[rows], pred[rows]))
    return [
        {name: np.concatenate([part[name] for part in chunk]) for name in chunk[0]}
        for chunk in chunks
    ]


def _evaluate(task: Task, label: Array, pred: Array) -> dict[str, Array]:
    """The task's metrics and its score over the last axis."""
    values = {name: METRICS[name](label, pred) for name in task.metrics}
    return {**values, SCORE: np.mean(list(values.values()), axis=0)}


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    stderr = np.sqrt(np.sum([one.stderr**2 for one in estimates])) / len(estimates)
    return Estimate(float(np.mean([one.value for one in estimates])), float(stderr))


def _records(estimates: dict[str, Estimate]) -> dict[str, dict[str, float]]:
    return {name: {"value": e.value, "stderr": e.stderr} for name, e in estimates.items()}
