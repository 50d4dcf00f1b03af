"""Time until `moelora --help` has answered, and of `import moelora_plugin` beside `import peft`.

    python benchmarks/startup.py [--repeats 15]

Whole processes, interleaved, medians. The suite does not time anything: it checks that these load
no heavy library (tests/cli/test_startup.py, tests/test_imports.py).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

PROGRAMS = {
    "python -c pass": "pass",
    "import moelora_plugin": "import moelora_plugin",
    "moelora --help": "import sys; sys.argv[1:] = ['--help']\n"
    "from moelora_cli.main import main; main()",
    "import peft": "import peft",
    "import moelora_plugin, peft": "import moelora_plugin, peft",
}


def seconds(program: str) -> float:
    """Wall time of a fresh interpreter running `program`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(repeats):
        for name, program in PROGRAMS.items():
            times[name].append(seconds(program))
    table = Table("", "median s")
    for name, values in times.items():
        table.add_row(name, f"{statistics.median(values):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
