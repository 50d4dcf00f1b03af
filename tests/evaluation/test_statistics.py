"""Standard errors and intervals against what is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from moelora_eval_tasks.catalog import TASKS
from moelora_plugin.evaluation import statistics
from moelora_plugin.evaluation.statistics import DRAWS, combine, measure

# The standard deviation of DRAWS numbers has a relative error of 1 / sqrt(2 DRAWS): four of those.
STDERR_TOLERANCE = 4 / np.sqrt(2 * DRAWS)


def _answers(n: int, share_right: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, n).astype(float)
    return label, np.where(rng.random(n) < share_right, label, 1 - label)


def test_the_standard_error_of_accuracy_is_the_binomial_one() -> None:
    label, pred = _answers(400, 0.8)
    acc = measure(TASKS["sst2"], label, pred).metrics["acc"]
    assert acc.value == np.mean(label == pred)
    expected = np.sqrt(acc.value * (1 - acc.value) / 400)
    assert acc.stderr == pytest.approx(expected, rel=STDERR_TOLERANCE)


def test_the_standard_error_of_a_correlation_is_the_asymptotic_one() -> None:
    rng = np.random.default_rng(0)
    label = rng.normal(size=2000)
    pred = label + rng.normal(size=2000)
    pearson = measure(TASKS["stsb"], label, pred).metrics["pearson"]
    expected = (1 - pearson.value**2) / np.sqrt(2000)  # for normal data, up to O(1 / n)
    # The data are one draw of 2,000, which adds to the bootstrap's own error.
    assert pearson.stderr == pytest.approx(expected, rel=2 * STDERR_TOLERANCE)


def test_the_score_is_the_mean_of_the_official_metrics() -> None:
    label, pred = _answers(200, 0.7)
    metrics = measure(TASKS["mrpc"], label, pred).metrics
    assert list(metrics) == ["acc", "f1", "score"]
    assert metrics["score"].value == pytest.approx((metrics["acc"].value + metrics["f1"].value) / 2)


def test_the_difference_is_paired() -> None:
    """Two models that err on nearly the same rows: the interval is far narrower than unpaired."""
    label, base = _answers(500, 0.6)
    pred = base.copy()
    mended = np.flatnonzero(base != label)[:25]
    pred[mended] = label[mended]
    measured = measure(TASKS["sst2"], label, pred, base)
    assert measured.difference is not None
    assert measured.base is not None
    low, high = measured.difference.interval
    assert measured.difference.value == pytest.approx(25 / 500)
    assert measured.difference.draws.std() == pytest.approx(
        np.sqrt(0.05 * 0.95 / 500), rel=STDERR_TOLERANCE
    )
    assert 0 < low < 0.05 < high < 0.05 + 2 * (0.05 - low)
    assert measured.base["acc"].stderr > 2 * measured.difference.draws.std()


def test_equal_predictions_differ_by_nothing_at_all() -> None:
    label, pred = _answers(50, 0.6)
    measured = measure(TASKS["cola"], label, pred, pred)
    assert measured.difference is not None
    assert measured.metrics == measured.base
    assert (measured.difference.value, measured.difference.interval) == (0, (0, 0))


def test_draws_depend_on_the_seed_and_the_task_only(monkeypatch: pytest.MonkeyPatch) -> None:
    label, pred = _answers(100, 0.7)
    first = measure(TASKS["sst2"], label, pred)
    assert measure(TASKS["sst2"], label, pred) == first
    assert measure(TASKS["sst2"], label, pred, seed=1) != first
    assert measure(TASKS["wnli"], label, pred) != first
    monkeypatch.setattr(statistics, "_CHUNK", 1000)  # a large split is drawn in parts
    chunked = measure(TASKS["sst2"], label, pred).metrics["acc"]
    assert chunked.stderr == pytest.approx(first.metrics["acc"].stderr, rel=STDERR_TOLERANCE)


def test_a_group_is_the_unweighted_mean_of_its_tasks() -> None:
    members = []
    for name, n, share in (("sst2", 300, 0.9), ("rte", 60, 0.6), ("wnli", 40, 0.5)):
        label, pred = _answers(n, share)
        members.append(measure(TASKS[name], label, pred, 1 - pred))
    group = combine(members)
    assert list(group.metrics) == ["score"]
    assert group.n == 400
    assert group.metrics["score"].value == np.mean([m.metrics["score"].value for m in members])
    variances = [m.metrics["score"].stderr ** 2 for m in members]
    assert group.metrics["score"].stderr == pytest.approx(np.sqrt(sum(variances)) / 3)
    assert group.base is not None
    assert group.difference is not None
    expected = group.metrics["score"].value - group.base["score"].value
    assert group.difference.value == pytest.approx(expected)
