"""Sites: where a routing decision is taken. One file each, one line in `SITES`."""

from __future__ import annotations

from .base import Site
from .linear import LinearSite

SITES: dict[str, type[Site]] = {
    "linear": LinearSite,
}

__all__ = ["SITES", "LinearSite", "Site"]
