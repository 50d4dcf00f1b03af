"""The official metrics, as pure functions that work on many samples at once.

Each takes labels and predictions of shape (..., n) and returns one value per leading index, so that
a bootstrap is one call on (draws, n). A metric that is undefined (no variance, no positive) is 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Metric = Callable[[Array, Array], Array]


def accuracy(label: Array, pred: Array) -> Array:
    """Share of predictions that are right."""
    hits: Array = (label == pred).mean(axis=-1)
    return hits


def f1(label: Array, pred: Array) -> Array:
    """F1 of class 1: 2 TP / (2 TP + FP + FN)."""
    tp, fp, fn, _ = _confusion(label, pred)
    return _divide(2 * tp, 2 * tp + fp + fn)


def matthews(label: Array, pred: Array) -> Array:
    """Matthews correlation: (TP TN - FP FN) / sqrt of the product of the four marginals."""
    tp, fp, fn, tn = _confusion(label, pred)
    marginals = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return _divide(tp * tn - fp * fn, np.sqrt(marginals))


def pearson(label: Array, pred: Array) -> Array:
    """Pearson's correlation."""
    x = label - label.mean(axis=-1, keepdims=True)
    y = pred - pred.mean(axis=-1, keepdims=True)
    return _divide((x * y).sum(axis=-1), np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1)))


def spearman(label: Array, pred: Array) -> Array:
    """Spearman's correlation: Pearson's of the ranks, ties sharing their mean rank."""
    from scipy.stats import rankdata

    return pearson(rankdata(label, axis=-1), rankdata(pred, axis=-1))


def parsed(label: Array, pred: Array) -> Array:
    """Share of the rows in whose text an answer was found; MISS is a prediction below 0."""
    del label
    share: Array = (pred >= 0).mean(axis=-1)
    return share


def matthews_times_parsed(label: Array, pred: Array) -> Array:
    """CoLA's metric in the paper's code: Matthews correlation of the parsed rows, times share."""
    return matthews(label, pred) * parsed(label, pred)


METRICS: dict[str, Metric] = {
    "acc": accuracy,
    "f1": f1,
    "mcc": matthews,
    "mcc_x_parsed": matthews_times_parsed,
    "parsed": parsed,
    "pearson": pearson,
    "spearman": spearman,
}


def _confusion(label: Array, pred: Array) -> tuple[Array, Array, Array, Array]:
    """Counts of true and false positives, false and true negatives, class 1 being positive.

    A row without a prediction is none of them.
    """
    truth, yes, no = label == 1, pred == 1, pred == 0
    pairs = (truth & yes, ~truth & yes, truth & no, ~truth & no)
    tp, fp, fn, tn = (pair.sum(axis=-1).astype(np.float64) for pair in pairs)
    return tp, fp, fn, tn


def _divide(numerator: Array, denominator: Array) -> Array:
    """The quotient, 0 where the denominator is."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)
