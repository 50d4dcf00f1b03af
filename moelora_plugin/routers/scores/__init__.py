"""Scores: where a router's logits come from. One file each, one line in `SCORES`."""

from __future__ import annotations

from .assigned import AssignedScore
from .base import Score
from .cosine import CosineScore
from .embedding import EmbeddingScore
from .linear import LinearScore
from .mlp import MlpScore
from .multi import MultiScore
from .prototype import PrototypeScore
from .recurrent import RecurrentScore
from .self_norm import SelfNormScore
from .self_rank import SelfRankScore
from .static import StaticScore

SCORES: dict[str, type[Score]] = {
    "linear": LinearScore,
    "mlp": MlpScore,
    "cosine": CosineScore,
    "prototype": PrototypeScore,
    "embedding": EmbeddingScore,
    "self_norm": SelfNormScore,
    "self_rank": SelfRankScore,
    "multi": MultiScore,
    "recurrent": RecurrentScore,
    "static": StaticScore,
    "assigned": AssignedScore,
}

__all__ = ["SCORES", "LinearScore", "Score"]
