"""The table, the JSON and the command line of measurements."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timing import Comparison, Ratio, Result, Settings, parser, settings_of

_PACKAGES = ("moelora", "torch", "transformers", "peft", "accelerate", "lm_eval", "numpy")
_COLUMNS = ("what", "ours", "against", "theirs", "figure (90 %)", "target", "met")

Measure = Callable[[Settings], Result]


def main(measure: Measure, file: str, doc: str) -> None:
    """The command line of one measurement."""
    options = parser(doc).parse_args()
    run({Path(file).stem: measure}, options)


def run(measures: dict[str, Measure], options: Namespace) -> bool:
    """Run measurements one after the other; print the table and write the JSON as asked.

    Args:
        measures: by name.
        options: as `timing.parser` parses them.

    Returns:
        Whether all of them ran through.
    """
    console = Console(stderr=True)
    settings = settings_of(options)
    torch.set_num_threads(settings.threads)
    record: dict[str, Any] = {"machine": machine(settings), "measurements": {}}
    results: dict[str, Result] = {}
    failed: list[str] = []
    for name, measure in measures.items():
        start = time.perf_counter()
        with console.status(name) as status:
            told = replace(settings, say=lambda text, n=name, s=status: s.update(f"{n}: {text}"))
            try:
                result = measure(told)
            except Exception as error:  # the others are still worth having
                console.print_exception()
                result = Result(left_out={name: f"failed: {type(error).__name__}: {error}"})
                failed.append(name)
        seconds = round(time.perf_counter() - start, 1)
        results[name] = result
        record["measurements"][name] = {"seconds": seconds, **result.as_json()}
        console.print(f"{name}: {seconds:.0f} s", highlight=False)
        if options.json:  # after each, so that what is done is not lost
            path = Path(options.json)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if options.markdown:
        print(markdown(results, settings))
    else:
        Console(width=None if sys.stdout.isatty() else 140).print(table(results, settings))
        for result in results.values():
            for name, reason in result.left_out.items():
                print(f"not measured: {name}: {reason}")
    return not failed


def table(results: dict[str, Result], settings: Settings) -> Table:
    """What was found, for the terminal."""
    made = Table(*_COLUMNS, title=_title(settings))
    for name, result in results.items():
        made.add_section()
        for comparison in result.comparisons:
            cells = _cells(comparison)
            style = {True: "green", False: "red"}.get(comparison.met, "")
            made.add_row(
                f"{name}: {cells[0]}", *cells[1:-1], f"[{style}]{cells[-1]}[/]" if style else ""
            )
    return made


def markdown(results: dict[str, Result], settings: Settings) -> str:
    """The same for docs/performance.md."""
    facts = machine(settings)
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items() if value)
    lines = [
        f"{facts['processor']}, {_title(settings)}; {versions}; {facts['date'][:10]}.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "|" + "---|" * len(_COLUMNS),
    ]
    for name, result in results.items():
        for comparison in result.comparisons:
            lines.append(f"| {name}: {' | '.join(_cells(comparison))} |")
    for result in results.values():
        lines += [f"\nNot measured: {name}: {why}." for name, why in result.left_out.items()]
    return "\n".join(lines)


def machine(settings: Settings) -> dict[str, Any]:
    """Where the figures come from."""
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "load_average_at_start": os.getloadavg()[0],
        "system": platform.platform(),
        "device": settings.device,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "quick": settings.quick,
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in _PACKAGES},
    }
    if settings.device == "cuda":
        facts["processor"] = torch.cuda.get_device_name()
        facts["versions"]["cuda"] = torch.version.cuda
    return facts


def _title(settings: Settings) -> str:
    dtype = str(settings.dtype).removeprefix("torch.")
    where = f"{settings.threads} threads" if settings.device == "cpu" else settings.device
    return f"{where}, {dtype}" + (", quick" if settings.quick else "")


def _cells(comparison: Comparison) -> list[str]:
    target, met = "", ""
    if comparison.at_most is not None:
        target = f"at most {_figure(comparison.at_most, comparison.unit)}"
    elif comparison.at_least is not None:
        target = f"at least {_figure(comparison.at_least, comparison.unit)}"
    if comparison.met is not None:
        met = "yes" if comparison.met else "no"
    ratio = _with_range(comparison.ratio, comparison.unit)
    return [
        comparison.what,
        comparison.ours,
        comparison.against,
        comparison.theirs,
        ratio,
        target,
        met,
    ]


def _figure(value: float, unit: str) -> str:
    return f"{value:.1f} {unit}" if value >= 9.95 else f"{value:.2f} {unit}"


def _with_range(ratio: Ratio, unit: str) -> str:
    if ratio.low == ratio.high:
        return _figure(ratio.value, unit)
    digits = 1 if ratio.value >= 9.95 else 2
    return f"{_figure(ratio.value, unit)} ({ratio.low:.{digits}f} to {ratio.high:.{digits}f})"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
