"""Looking at adapters: which experts are used, and what is on disk."""

from __future__ import annotations

from .routing import RoutingStatistics, routing_statistics
from .summary import AdapterSummary, inspect_adapter

__all__ = ["AdapterSummary", "RoutingStatistics", "inspect_adapter", "routing_statistics"]
