"""Scores: where a router's logits come from. One file each, one line in `SCORES`."""

from __future__ import annotations

from .base import Score
from .linear import LinearScore

SCORES: dict[str, type[Score]] = {
    "linear": LinearScore,
}

__all__ = ["SCORES", "LinearScore", "Score"]
