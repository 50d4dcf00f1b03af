"""From what a model answered to a prediction, and to what lm-eval aggregates.

Every metric of a row is the pair (label, prediction); the aggregations turn a list of pairs into
the metric. lm-eval has no standard errors for aggregations that are not its own, and its bootstrap
would take 100,000 Python iterations; `moelora eval` computes them from the same pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .catalog import TASKS
from .metrics import METRICS
from .parsing import MISS, PARSERS
from .task import Task

Pair = tuple[float, float]
SCORE = "score"


def predict(task: Task, loglikelihoods: Sequence[float]) -> float:
    """The prediction of one row.

    The index of the likeliest answer; for a real rating, the mean of the labels under the answers'
    probabilities, sum_i labels_i softmax(loglikelihoods)_i, a real number as the label is.

    Args:
        task: an entry of the catalog.
        loglikelihoods: of each answer of the row, in order.
    """
    values = np.asarray(loglikelihoods, dtype=np.float64)
    if task.rating != "mean":
        return float(values.argmax())
    weights = np.exp(values - values.max())
    return float(weights @ np.asarray(task.labels, dtype=np.float64) / weights.sum())


def process_results(
    doc: Mapping[str, Any], results: Sequence[tuple[float, bool]] | Sequence[str]
) -> dict[str, Pair]:
    """lm-eval's hook: the metrics of one row.

    Args:
        doc: a row of `loading.load_for_lm_eval`.
        results: (log-likelihood, is greedy) of each answer, or the one text that was written.
    """
    task = TASKS[doc["task"]]
    if task.generates:
        found = PARSERS[task.parser](task, str(results[0]), tuple(doc["options"]))
        pred = float(doc["guess"] if found == MISS else found)
    else:
        pred = predict(task, [float(result[0]) for result in results])
    return dict.fromkeys((*task.metrics, SCORE), (doc["label"], pred))


def _aggregation(*names: str) -> Callable[[Sequence[Pair]], float]:
    """lm-eval's aggregation: the mean of the named metrics."""

    def aggregate(pairs: Sequence[Pair]) -> float:
        label, pred = np.asarray(pairs, dtype=np.float64).T
        return float(np.mean([METRICS[name](label, pred) for name in names]))

    return aggregate


acc = _aggregation("acc")
f1 = _aggregation("f1")
mcc = _aggregation("mcc")
mcc_x_parsed = _aggregation("mcc_x_parsed")
parsed = _aggregation("parsed")
pearson = _aggregation("pearson")
spearman = _aggregation("spearman")
acc_and_f1 = _aggregation("acc", "f1")
pearson_and_spearman = _aggregation("pearson", "spearman")
