"""The metrics against scikit-learn's and scipy's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn

from moelora_eval_tasks.catalog import TASKS
from moelora_eval_tasks.metrics import METRICS
from moelora_eval_tasks.parsing import MISS
from moelora_eval_tasks.scoring import predict, process_results


def _mcc_x_parsed(label: np.ndarray, pred: np.ndarray) -> float:
    """As the paper's code has it: the rows without an answer are left out of the correlation."""
    found = pred != MISS
    return sklearn.matthews_corrcoef(label[found], pred[found]) * found.mean()


REFERENCES: dict[str, Callable[..., float]] = {
    "acc": sklearn.accuracy_score,
    "f1": sklearn.f1_score,
    "mcc": sklearn.matthews_corrcoef,
    "mcc_x_parsed": _mcc_x_parsed,
    "parsed": lambda label, pred: 1 - np.mean(pred == MISS),
    "pearson": lambda label, pred: stats.pearsonr(label, pred).statistic,
    "spearman": lambda label, pred: stats.spearmanr(label, pred).statistic,
}


def _samples(name: str, draws: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    if name in ("pearson", "spearman"):
        label = rng.integers(0, 11, (draws, n)) / 2  # with ties, as STS-B's labels have
        return label, label + rng.normal(size=(draws, n))
    label = rng.integers(0, 2, (draws, n))
    pred = np.where(rng.random((draws, n)) < 0.3, 1 - label, label)
    if name in ("acc", "parsed", "mcc_x_parsed"):  # the metrics of what is written
        pred[rng.random((draws, n)) < 0.2] = MISS
    return label.astype(float), pred.astype(float)


@pytest.mark.parametrize("name", METRICS)
def test_each_metric_equals_its_reference_on_every_draw(name: str) -> None:
    label, pred = _samples(name, draws=7, n=60)
    expected = [REFERENCES[name](a, b) for a, b in zip(label, pred, strict=True)]
    np.testing.assert_allclose(METRICS[name](label, pred), expected, rtol=1e-12)
    assert METRICS[name](label[0], pred[0]) == pytest.approx(expected[0], rel=1e-12)


@pytest.mark.parametrize("name", ["f1", "mcc", "mcc_x_parsed", "pearson", "spearman"])
def test_an_undefined_metric_is_zero(name: str) -> None:
    constant = np.zeros(5)
    assert METRICS[name](constant, constant) == 0


def test_a_model_that_answers_nothing_scores_zero() -> None:
    label, nothing = np.array([0.0, 1.0]), np.full(2, float(MISS))
    assert [METRICS[name](label, nothing) for name in ("acc", "parsed", "mcc_x_parsed")] == [0] * 3


def test_the_likeliest_answer_is_predicted() -> None:
    assert predict(TASKS["mnli"], [-3.0, -1.0, -2.0]) == 1


def test_a_rating_is_the_mean_under_the_answers_probabilities() -> None:
    probabilities = np.array([0.1, 0.0, 0.2, 0.0, 0.3, 0.4])
    with np.errstate(divide="ignore"):
        loglikelihoods = np.log(0.5 * probabilities)  # half of the mass is on other text
    assert predict(TASKS["stsb"], loglikelihoods) == pytest.approx(0.4 + 1.2 + 2.0)


def test_every_metric_of_a_row_is_its_label_and_prediction() -> None:
    doc = {"task": "mrpc", "label": 1.0}
    assert process_results(doc, [(-2.0, False), (-1.0, True)]) == {
        "acc": (1.0, 1.0),
        "f1": (1.0, 1.0),
        "score": (1.0, 1.0),
    }


def test_a_written_answer_is_looked_for_and_a_guess_takes_only_the_place_of_a_miss() -> None:
    doc = {"task": "cola_paper", "label": 1.0, "options": [], "guess": 0}

    def pair(text: str, guess: int) -> tuple[float, float]:
        scored = process_results(doc | {"guess": guess}, [text])
        assert set(scored) == {"mcc_x_parsed", "parsed", "score"}
        return scored["score"]

    assert pair("The sentence is grammatically correct.", guess=0) == (1.0, 1.0)
    assert pair("I cannot say.", guess=0) == (1.0, 0.0)
    assert pair("I cannot say.", guess=MISS) == (1.0, -1.0)
