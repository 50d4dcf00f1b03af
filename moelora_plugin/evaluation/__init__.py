"""Evaluation: base and adapter on one load, through lm-eval."""

from __future__ import annotations

from .report import EvaluationReport
from .request import EvaluationRequest
from .runner import evaluate, evaluate_model
from .statistics import Difference, Estimate, Measurement
from .subjects import BASE

__all__ = [
    "BASE",
    "Difference",
    "Estimate",
    "EvaluationReport",
    "EvaluationRequest",
    "Measurement",
    "evaluate",
    "evaluate_model",
]
