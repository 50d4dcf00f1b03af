"""Sites: where a routing decision is taken. One file each, one line in `SITES`."""

from __future__ import annotations

from .base import Site
from .block import BlockSite
from .layer import LayerSite
from .linear import LinearSite
from .model import ModelSite

SITES: dict[str, type[Site]] = {
    "linear": LinearSite,
    "block": BlockSite,
    "layer": LayerSite,
    "model": ModelSite,
}

__all__ = ["SITES", "BlockSite", "LayerSite", "LinearSite", "ModelSite", "Site"]
