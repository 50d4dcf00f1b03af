"""Time until `moelora --help` has answered, and what moelora adds to other packages' imports.

    python benchmarks/startup.py [--rounds 15]

Whole processes, interleaved. moelora must be installed. The suite does not time anything: it checks
that these load no heavy library (tests/cli/test_startup.py, tests/test_imports.py).
"""

from __future__ import annotations

import subprocess
import sys

from report import main
from timing import Comparison, Result, Settings, interleave

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


def measure(settings: Settings) -> Result:
    """Seconds of fresh interpreters."""
    if settings.device != "cpu":
        return Result(left_out={"startup": "the same whatever the device; run it without --device"})
    programs = {
        name: program
        for name, program in PROGRAMS.items()
        if not (settings.quick and name.startswith("import torch"))
    }
    times = interleave(
        {name: lambda p=program: interpreter(p) for name, program in programs.items()},
        settings,
        warm_up=1,
        label="processes",
    )
    result = Result()
    result.add("process", times)
    peft = "import peft, without our entry point"
    help_seconds = times.median("moelora --help")
    result.comparisons = [
        Comparison(
            "moelora --help",
            f"{help_seconds:.2f} s",
            "",
            "",
            times.value("moelora --help"),
            at_most=0.5,
            unit="s",
        ),
        times.compare("import moelora_plugin", "import moelora_plugin", peft, at_most=1.05),
        times.compare("import peft, with ours installed", "import peft", peft, at_most=1.05),
    ]
    if not settings.quick:
        result.comparisons.append(
            times.compare(
                "import torch, with ours installed",
                "import torch",
                "import torch, without our entry point",
            )
        )
    return result


def interpreter(program: str) -> None:
    """Run a program in a fresh interpreter."""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


if __name__ == "__main__":
    main(measure, __file__, __doc__)
