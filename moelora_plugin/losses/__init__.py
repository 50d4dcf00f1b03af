"""Auxiliary losses on routers and experts. One file each, one line in `LOSSES`."""

from __future__ import annotations

from .base import AuxLoss, LossInput, on_nothing
from .contrastive import contrastive
from .entropy import entropy
from .importance_cv2 import importance_cv2
from .lambda_sparsity import lambda_sparsity
from .load_cv2 import load_cv2
from .localized_cv2 import localized_cv2
from .orthogonal import orthogonal
from .rsl import rsl
from .switch_lb import switch_lb
from .z import z

LOSSES: dict[str, AuxLoss] = {
    "switch_lb": switch_lb,
    "z": z,
    "importance_cv2": importance_cv2,
    "load_cv2": load_cv2,
    "localized_cv2": localized_cv2,
    "entropy": entropy,
    "lambda_sparsity": lambda_sparsity,
    "contrastive": contrastive,
    "orthogonal": orthogonal,
    "rsl": rsl,
}

__all__ = [
    "LOSSES",
    "AuxLoss",
    "LossInput",
    "contrastive",
    "entropy",
    "importance_cv2",
    "lambda_sparsity",
    "load_cv2",
    "localized_cv2",
    "on_nothing",
    "orthogonal",
    "rsl",
    "switch_lb",
    "z",
]
