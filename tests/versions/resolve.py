"""Write the sets of versions anew: `make versions`.

    python tests/versions/resolve.py newest previous lowest

"newest" is the newest of everything that pip finds for `pyproject.toml`, and of the packages that
bases may be quantised with; "previous" the same, without those, with the transformers before that,
which still takes adapters of the newest PEFT (`tests/native.py`); "lowest" has each package that
`pyproject.toml` names at its lower bound, and the newest of what those need. torch is held at what
`constraints.txt` names in all: a machine offers one build, and another is a download of gigabytes.
The tests' own tools are the newest.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
EXTRAS = ("eval", "plot", "cluster", "vision", "demo")
PREVIOUS = "transformers==5.23.0"
QUANTISERS = ("bitsandbytes", "torchao")
TOOLS = ("hypothesis", "pytest", "pytest-xdist", "setuptools")


def resolve(name: str) -> None:
    """Let pip choose in an environment of its own, and write down what it chose."""
    torch = next(
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith("torch==")
    )
    held_too = {"newest": [], "previous": [PREVIOUS], "lowest": lowest_bounds()}
    bounds = [torch, *held_too[name]]
    with tempfile.TemporaryDirectory() as folder:
        held = Path(folder) / "held.txt"
        held.write_text("\n".join(bounds) + "\n")
        venv.create(Path(folder) / "venv", with_pip=True)
        pip = [str(Path(folder) / "venv" / "bin" / "python"), "-m", "pip"]
        install = [*pip, "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, torch], check=True)
        wanted = [f"{ROOT}[{','.join(EXTRAS)}]", *TOOLS]
        wanted += QUANTISERS if name == "newest" else ()
        subprocess.run([*install, "-c", str(held), *wanted], check=True)
        frozen = subprocess.run(
            [*pip, "freeze", "--all", "--exclude", "moelora", "--exclude", "pip"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    # A build of its own may call itself 2.13.0+cpu, which no registry has.
    pins = [line.split("+cpu")[0] for line in frozen.splitlines() if "==" in line]
    title = f"# The {name} set of versions; written by `make versions`, see resolve.py.\n"
    (HERE / f"{name}.txt").write_text(title + "\n".join(pins) + "\n")


def lowest_bounds() -> list[str]:
    """`name==bound` for every package that users' environments need, torch left out."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    found = {}
    for text in (*project["dependencies"], *(t for extra in EXTRAS for t in optional[extra])):
        requirement = Requirement(text)
        for bound in requirement.specifier:
            if bound.operator == ">=" and requirement.name != "torch":
                found[requirement.name] = f"{requirement.name}=={bound.version}"
    return sorted(found.values())


if __name__ == "__main__":
    for _name in sys.argv[1:]:
        resolve(_name)
