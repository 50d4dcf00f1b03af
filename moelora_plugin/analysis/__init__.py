"""Looking at adapters: which experts are used, and what is on disk.

The names are served on first use (PEP 562): `doctor` must also work where `import torch` fails.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .routing import RoutingStatistics, routing_statistics
    from .summary import AdapterSummary, inspect_adapter

_HOME_OF = {
    "AdapterSummary": "summary",
    "RoutingStatistics": "routing",
    "inspect_adapter": "summary",
    "routing_statistics": "routing",
}

__all__ = ["AdapterSummary", "RoutingStatistics", "inspect_adapter", "routing_statistics"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
