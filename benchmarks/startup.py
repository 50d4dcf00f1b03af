"""Time until `moelora --help` has answered, and what moelora adds to other packages' imports.

    python benchmarks/startup.py [--repeats 15]

Whole processes, interleaved, medians; on a busy machine the processor time is the one to look at.
moelora must be installed. The suite does not time anything: it checks that these load no heavy
library (tests/cli/test_startup.py, tests/test_imports.py).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

# That torch looks for entry points is no cost of ours: it looks, and finds none.
WITHOUT = """
import importlib.metadata as metadata
found = metadata.entry_points
metadata.entry_points = lambda **by: () if by.get("group") == "torch.backends" else found(**by)
"""
LOADED = "\nimport sys; assert {}('moelora_plugin.autoload' in sys.modules)"

PROGRAMS = {
    "python -c pass": "pass",
    "import moelora_plugin": "import moelora_plugin",
    "moelora --help": "import sys; sys.argv[1:] = ['--help']\n"
    "from moelora_cli.main import main; main()",
    "import torch, without our entry point": WITHOUT + "import torch" + LOADED.format("not "),
    "import torch": "import torch" + LOADED.format(""),
    "import peft, without our entry point": WITHOUT + "import peft" + LOADED.format("not "),
    "import peft": "import peft" + LOADED.format(""),
}


def seconds(program: str) -> tuple[float, float]:
    """Wall and processor time of a fresh interpreter running `program`."""
    start, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    wall, after = time.perf_counter() - start, os.times()
    used = after.children_user + after.children_system
    return wall, used - before.children_user - before.children_system


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in PROGRAMS}
    for _ in range(repeats):
        for name, program in PROGRAMS.items():
            times[name].append(seconds(program))
    table = Table("median of", "wall s", "processor s")
    for name, values in times.items():
        table.add_row(
            name, *(f"{statistics.median(kind):.2f}" for kind in zip(*values, strict=True))
        )
    Console().print(table)


if __name__ == "__main__":
    main()
