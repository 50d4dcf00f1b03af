"""All measurements: one table and one JSON file.

    python benchmarks/run.py [--only layer,step] [--quick] [--device cuda --dtype bfloat16]
                             [--json build/bench.json] [--markdown]

Every measurement is also a program of its own (`python benchmarks/layer.py`), whose docstring says
what is measured. Ratios are what counts: candidates take turns in one process, and a figure is a
ratio of medians with the middle 90 % of what resampled rounds give for it. Leave the machine alone
meanwhile. About 20 minutes on two cores, two with --quick.
"""

from __future__ import annotations

import difflib
import importlib
import sys

from report import Measure, run
from timing import parser

MEASUREMENTS = (
    "layer",
    "memory",
    "step",
    "optimizer",
    "growth",
    "decode",
    "evaluation",
    "startup",
    "moepeft",
    "gpu_step",
)


def chosen(names: str | None) -> dict[str, Measure]:
    """The measurements called for, by name; all without `names`."""
    wanted = names.split(",") if names else MEASUREMENTS
    for name in wanted:
        if name not in MEASUREMENTS:
            near = difflib.get_close_matches(name, MEASUREMENTS, n=1)
            known = f"did you mean {near[0]}?" if near else f"known are {', '.join(MEASUREMENTS)}."
            raise SystemExit(f"--only {name}: no such measurement; {known}")
    return {name: importlib.import_module(name).measure for name in wanted}


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--only", metavar="NAMES", help=f"some of {', '.join(MEASUREMENTS)}")
    parsed = options.parse_args()
    sys.exit(0 if run(chosen(parsed.only), parsed) else 1)
