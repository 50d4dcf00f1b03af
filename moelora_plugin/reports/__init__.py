"""Runs that were written, read back: compared, summed up over seeds, shown as a page."""

from __future__ import annotations

from .compare import Comparison, compare, read_runs
from .seeds import SeedComparison, compare_seeds
from .write import write_reports

__all__ = [
    "Comparison",
    "SeedComparison",
    "compare",
    "compare_seeds",
    "read_runs",
    "write_reports",
]
