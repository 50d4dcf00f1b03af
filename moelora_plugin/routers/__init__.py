"""Routers: the modules that turn logits into gates.

One file each, one line in `ROUTERS`. Where the logits come from is in `inputs/` and `scores/`, what
may be changed on the way in `modifiers/`.
"""

from __future__ import annotations

from .base import Router
from .expert_choice import ExpertChoiceRouter
from .hard import HardRouter
from .noisy_topk import NoisyTopKRouter
from .relu import ReluRouter
from .sigmoid import SigmoidRouter
from .sinkhorn import SinkhornRouter
from .softmax import SoftmaxRouter
from .sparsegen import SparsegenRouter
from .threshold import ThresholdRouter
from .top_p import TopPRouter
from .topk import TopKRouter
from .trial import try_routing

ROUTERS: dict[str, type[Router]] = {
    "topk": TopKRouter,
    "softmax": SoftmaxRouter,
    "top_p": TopPRouter,
    "threshold": ThresholdRouter,
    "sparsegen": SparsegenRouter,
    "sigmoid": SigmoidRouter,
    "relu": ReluRouter,
    "hard": HardRouter,
    "noisy_topk": NoisyTopKRouter,
    "expert_choice": ExpertChoiceRouter,
    "sinkhorn": SinkhornRouter,
}

__all__ = [
    "ROUTERS",
    "ExpertChoiceRouter",
    "HardRouter",
    "NoisyTopKRouter",
    "ReluRouter",
    "Router",
    "SigmoidRouter",
    "SinkhornRouter",
    "SoftmaxRouter",
    "SparsegenRouter",
    "ThresholdRouter",
    "TopKRouter",
    "TopPRouter",
    "try_routing",
]
