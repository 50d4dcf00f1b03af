"""Routers: the modules that turn logits into gates.

One file each, one line in `ROUTERS`. Where the logits come from is in `inputs/` and `scores/`, what
may be changed on the way in `modifiers/`.
"""

from __future__ import annotations

from .base import Router
from .topk import TopKRouter

ROUTERS: dict[str, type[Router]] = {
    "topk": TopKRouter,
}

__all__ = ["ROUTERS", "Router", "TopKRouter"]
