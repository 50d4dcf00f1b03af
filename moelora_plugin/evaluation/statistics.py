"""Metrics with standard errors, and paired differences with intervals and tests.

Rows are drawn with replacement, 1,000 times (Efron and Tibshirani, *An Introduction to the
Bootstrap*, 1993, ch. 6 and 13). A standard error is the standard deviation of a metric over the
draws, an interval their 2.5 % and 97.5 % quantiles. All models see the same draws, so their
differences are paired: rows that both get right cancel. And the draws depend on the seed, the task
and its rows alone, so a model's numbers are the same whatever other models stand beside it.

This is what other rows like these would change. How much another training run differs is a matter
of several training seeds (`seeds`).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from moelora_eval_tasks.catalog import Task
from moelora_eval_tasks.metrics import METRICS, Array
from moelora_eval_tasks.scoring import SCORE

from ..schema import NOT_IN_FILES

Key = TypeVar("Key")

DRAWS = 1000
CONFIDENCE = 0.95
_CHUNK = 2**21  # rows drawn at once: bounds memory at some tens of MB, whatever the split's size
# A true difference of 1.96 + 0.84 standard errors is outside of the noise four times in five.
_POWERED = 1.96 + 0.84


@dataclass(frozen=True)
class Estimate:
    """A metric and its standard error."""

    value: float
    stderr: float


@dataclass(frozen=True)
class Difference:
    """A model's score minus the reference's, on the same rows.

    Attributes:
        value: on the rows as they are.
        stderr: its standard error.
        low: lower end of the 95 % percentile interval.
        high: upper end.
        p_value: of McNemar's exact test that both are right equally often; None where the score is
            not the share of rows that are right.
    """

    value: float
    stderr: float
    low: float
    high: float
    p_value: float | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval."""
        return self.low, self.high

    @property
    def within_noise(self) -> bool:
        """Whether the interval holds 0: other rows could turn the difference round."""
        return self.low <= 0 <= self.high

    @property
    def detectable(self) -> float:
        """How large a true difference must be to be outside of the noise four times in five."""
        return _POWERED * self.stderr

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the JSON file."""
        return {**vars(self), "confidence": CONFIDENCE, "within_noise": self.within_noise}


@dataclass(frozen=True)
class Measurement:
    """What the models came out at on one task, or on one group of tasks.

    Attributes:
        n: rows.
        metrics: by model the task's metrics and "score", the mean of those that are scored; a
            group has only "score".
        differences: by model its score minus the reference's; empty without a reference.
        categories: the same on the rows of each category, where the task has categories.
        draws: by model the score on each draw of rows, (DRAWS,); empty where it was read back.
    """

    n: int
    metrics: dict[str, dict[str, Estimate]]
    differences: dict[str, Difference] = field(default_factory=dict)
    categories: dict[str, Measurement] = field(default_factory=dict)
    draws: dict[str, Array] = field(
        default_factory=dict, repr=False, compare=False, metadata=NOT_IN_FILES
    )

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
    draws = {model: values[SCORE] for model, values in drawn.items()}
    differences = {}
    if reference is not None:
        for model in preds:
            if model != reference:
                right, others_right = (preds[name] == label for name in (model, reference))
                p_value = mcnemar(right, others_right) if task.scored == ("acc",) else None
                differences[model] = _difference(metrics, draws, model, reference, p_value)
    parts = {}
    if categories is not None:
        of_row = np.asarray(categories)
        for category in dict.fromkeys(categories):
            rows = of_row == category
            chosen = {model: pred[rows] for model, pred in preds.items()}
            parts[category] = measure(task, label[rows], chosen, reference, seed)
    return Measurement(len(label), metrics, differences, parts, draws)


def combine(members: Sequence[Measurement]) -> Measurement:
    """The unweighted mean of the scores of a group's tasks.

    The tasks' rows are independent, so the standard error is sqrt(sum_k stderr_k^2) / K.
    """
    first = members[0]
    metrics = {
        model: {SCORE: _mean([member.metrics[model][SCORE] for member in members])}
        for model in first.metrics
    }
    draws = {
        model: np.mean([member.draws[model] for member in members], axis=0) for model in first.draws
    }
    reference = next((model for model in metrics if model not in first.differences), None)
    return Measurement(
        sum(member.n for member in members),
        metrics,
        {model: _difference(metrics, draws, model, str(reference)) for model in first.differences},
        draws=draws,
    )


def mcnemar(right: NDArray[np.bool_], others_right: NDArray[np.bool_]) -> float:
    """McNemar's exact two-sided test (*Psychometrika* 12, 1947) on paired right and wrong answers.

    Under the null hypothesis each row that only one of two models gets right is a fair coin's toss.

    Args:
        right: whether a model is right, (n,).
        others_right: whether the other one is, (n,).
    """
    from scipy.stats import binomtest

    only_one, only_other = int((right & ~others_right).sum()), int((~right & others_right).sum())
    discordant = only_one + only_other
    return float(binomtest(only_one, discordant).pvalue) if discordant else 1.0


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """p-values adjusted for their number (Holm, *Scandinavian Journal of Statistics* 6, 1979).

    Sorted upwards, the k-th of m is multiplied by m - k + 1, and none is below the one before it.
    Calling those below 0.05 real errs once or more in at most 5 % of such families of tests.
    """
    adjusted: dict[Key, float] = {}
    highest = 0.0
    for rank, (key, p_value) in enumerate(sorted(p_values.items(), key=itemgetter(1))):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_value))
        adjusted[key] = highest
    return adjusted


def noise_warning(tasks: Mapping[str, Measurement], groups: Mapping[str, Measurement]) -> str:
    """One line on the differences that are within the noise; empty where there are none.

    It also says what these rows can show: below `detectable` a difference needs more rows. That
    does not depend on the difference seen, which is mostly noise itself.
    """
    found: dict[str, list[str]] = {}
    for name, measured in (*tasks.items(), *groups.items()):
        for model, difference in measured.differences.items():
            if difference.within_noise:
                least = f"{100 * difference.detectable:.1f}" if difference.stderr else "equal"
                found.setdefault(model, []).append(f"{name} ({least})")
    if not found:
        return ""
    lists = "; ".join(f"{model} on {', '.join(names)}" for model, names in found.items())
    return (
        f"Within noise, as the 95 % interval holds 0: {lists}. In brackets the points from which "
        "on a true difference would show on these rows in four runs of five."
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


def _difference(
    metrics: Mapping[str, Mapping[str, Estimate]],
    draws: Mapping[str, Array],
    model: str,
    reference: str,
    p_value: float | None = None,
) -> Difference:
    drawn = draws[model] - draws[reference]
    low, high = percentile_interval(drawn)
    value = metrics[model][SCORE].value - metrics[reference][SCORE].value
    return Difference(value, float(drawn.std(ddof=1)), low, high, p_value)


def percentile_interval(draws: Array) -> tuple[float, float]:
    """The middle 95 % of the draws."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, (tail, 1 - tail))
    return float(low), float(high)


def _mean(estimates: Iterable[Estimate]) -> Estimate:
    values, stderrs = np.transpose([(one.value, one.stderr) for one in estimates])
    return Estimate(float(values.mean()), float(np.sqrt((stderrs**2).sum()) / len(stderrs)))
