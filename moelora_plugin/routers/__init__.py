"""Routers: the modules that turn a layer's input into gates.

One file each, one line in `ROUTERS`.
"""

from __future__ import annotations

from .base import Router
from .topk import TopKRouter

ROUTERS: dict[str, type[Router]] = {
    "topk": TopKRouter,
}

__all__ = ["ROUTERS", "Router", "TopKRouter"]
