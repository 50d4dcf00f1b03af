"""Virtual environments of pinned packages, built once and kept in the user's cache.

    python tests/hosts/environments.py                # builds the hosts' that are missing
    python tests/hosts/environments.py axolotl lowest

There is one for each host, and one for each set of versions that `tests/versions` runs the core of
the suite with. An environment holds exactly the packages of its list of pins and not moelora, so
that a host can be run with and without it. Its folder carries a digest of everything it was made
from: a change of the pins makes a new one. `MOELORA_HOSTS_CACHE` names another place for the hosts'
than `~/.cache/moelora/hosts`; the others lie in `~/.cache/moelora/envs`.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
PINS = Path(__file__).parent / "pins"
VERSIONS = ROOT / "tests" / "versions"
NAMES = sorted(file.stem for file in PINS.glob("*.txt"))

# LLaMA-Factory imports torchaudio whatever it is asked to do. PyPI's torchaudio and torchvision are
# built for CUDA only and do not load beside a CPU build of torch; for text, an empty one is enough.
STUBS = {"llamafactory": ("torchaudio",)}


def environment(name: str) -> Path:
    """The folder of the environment called `name`, built if it is not there."""
    kind = "hosts" if _pins(name).parent == PINS else "envs"
    folder = cache(kind) / f"{name}-{_digest(name)}"
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        _build(name, folder)
        (folder / "ready").touch()
    return folder


def cache(kind: str = "hosts") -> Path:
    """Where the environments lie."""
    chosen = os.environ.get("MOELORA_HOSTS_CACHE")
    if chosen and kind == "hosts":
        return Path(chosen)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "moelora" / kind


def install_moelora(folder: Path) -> Path:
    """A folder inside this one with moelora as pip installs it, entry point and all."""
    # From a copy: setuptools' scratch folder in the checkout may hold files since deleted, and two
    # test processes must not share it.
    source, target = folder / "source", folder / "site"
    for name in ("cli", "eval_tasks", "moelora_plugin"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*pip, *options, str(source)], check=True)
    return target


def _pins(name: str) -> Path:
    """The list of an environment's packages."""
    own = PINS / f"{name}.txt"
    return own if own.exists() else VERSIONS / f"{name}.txt"


def _digest(name: str) -> str:
    made_from = [
        _pins(name).read_text(),
        platform.python_version(),
        str(STUBS.get(name)),
    ]
    return hashlib.sha256("\n".join(made_from).encode()).hexdigest()[:12]


def _build(name: str, folder: Path) -> None:
    print(f"Building the environment of {name} in {folder}", flush=True)
    pins = _pins(name).read_text().splitlines()
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch first and alone: a machine may offer a build of its own. The rest is a complete list, so
    # nothing is resolved and nothing can pull another torch in.
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    subprocess.run([*pip, torch], check=True)
    subprocess.run([*pip, "--no-deps", "-r", str(_pins(name))], check=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    for stub in STUBS.get(name, ()):
        package = site / "site-packages" / stub
        package.mkdir()
        (package / "__init__.py").write_text('"""Empty: see tests/hosts/environments.py."""\n')


if __name__ == "__main__":
    # Two at a time: a build waits for the network, the disk and one core in turn.
    names = sys.argv[1:] or NAMES
    with ThreadPoolExecutor(2) as pool:
        for _name, _folder in zip(names, pool.map(environment, names), strict=True):
            print(_name, _folder, flush=True)
