"""What is declared is what the folders hold, and what the wheel holds."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it on Python 3.10

ROOT = Path(__file__).parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
FOLDERS: dict[str, str] = SETUPTOOLS["package-dir"]


# Python files that are no modules of ours: what `moelora init` fills in, and what Python looks for
# by its plain name on a path of our making.
DATA_FOLDERS = {"moelora_plugin/integrations/templates", "moelora_plugin/launch/site"}


def packaged(suffix: str) -> set[str]:
    """The files of our folders that end so, by the path they install under."""
    return {
        (Path(package) / path.relative_to(ROOT / folder)).as_posix()
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob(f"*{suffix}")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_every_folder_with_python_files_is_a_declared_package() -> None:
    found = {Path(path).parent.as_posix() for path in packaged(".py")} - DATA_FOLDERS
    assert {folder.replace("/", ".") for folder in found} == set(SETUPTOOLS["packages"])


def test_every_package_has_an_init_file() -> None:
    expected = {f"{name.replace('.', '/')}/__init__.py" for name in SETUPTOOLS["packages"]}
    assert expected <= packaged(".py")


def test_constraints_are_pins_of_released_versions() -> None:
    pin = re.compile(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*( ; python_version >= \"3\.\d+\")?")
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [line for line in pins if not pin.fullmatch(line)] == []


def test_every_requirement_has_a_pin() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    wanted = itertools.chain(PYPROJECT["project"]["dependencies"], *extras.values())
    names = {re.split(r"[\[><=]", requirement)[0] for requirement in wanted} - {"moelora"}
    pins = (ROOT / "constraints.txt").read_text("utf-8").lower().replace("_", "-")
    assert {name for name in names if f"\n{name.lower()}==" not in pins} == set()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel, built from a copy: setuptools leaves its scratch files beside the sources."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS.values():
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(source)]
    completed = subprocess.run(command, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    (path,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_has_our_three_packages_only(wheel: zipfile.ZipFile) -> None:
    top_level = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top_level if not name.endswith(".dist-info")} == set(FOLDERS)


def test_wheel_has_every_module_and_data_file(wheel: zipfile.ZipFile) -> None:
    held = set(wheel.namelist())
    folders = {*DATA_FOLDERS, "moelora_plugin/demo/data"}
    data = {name for name in packaged("") if Path(name).parent.as_posix() in folders}
    assert {Path(name).parent.as_posix() for name in data} == folders
    for expected in (packaged(".py"), packaged(".yaml"), packaged("py.typed"), data):
        assert expected <= held
    assert {f"{package}/py.typed" for package in FOLDERS} <= held


def test_wheel_declares_the_command_and_the_entry_point(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    text = wheel.read(name).decode()
    assert "[console_scripts]\nmoelora = moelora_cli.main:main\n" in text
    assert "[torch.backends]\nmoelora = moelora_plugin.autoload:install\n" in text
