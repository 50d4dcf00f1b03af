"""`import torch` loads our entry point: it may never be what makes that fail."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from moelora_plugin import autoload

PACKAGES = Path(torch.__file__).parents[1]
(ENTRY,) = (one for one in entry_points(group="torch.backends") if one.name == "moelora")


def python(program: str, *site: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it without the packages of this environment, but with torch's folder and `site`."""
    folders = [str(folder) for folder in (*site, PACKAGES)]
    lines = f"import sys\nsys.path[:0] = {folders!r}\n{textwrap.dedent(program)}"
    return subprocess.run(
        [sys.executable, "-S", "-c", lines],
        env={**os.environ, "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def distribution(folder: Path, name: str, target: str) -> Path:
    """Metadata without a package, as a broken installation leaves it."""
    info = folder / f"{name}-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    (info / "entry_points.txt").write_text(f"[torch.backends]\n{name} = {target}\n")
    return folder


GONE = """
    class Gone:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "moelora_plugin":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Gone())
    import torch
    print("imported")
"""


def test_the_way_out_where_the_package_is_gone(tmp_path: Path) -> None:
    """No form of an entry point helps, as none of our code is there: the docs say what does."""
    site = distribution(tmp_path, "moelora", ENTRY.value)
    failed = python(GONE, site)
    assert "Failed to load the backend extension: moelora" in failed.stderr
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in failed.stderr
    saved = python(GONE, site, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert (saved.stdout, saved.returncode) == ("imported\n", 0), saved.stderr
    docs = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
    for way in ("TORCH_DEVICE_BACKEND_AUTOLOAD=0", "pip uninstall moelora"):
        assert way in docs.read_text(encoding="utf-8")


def test_doctor_works_and_names_what_breaks_it(tmp_path: Path) -> None:
    site = distribution(tmp_path, "somebody-s-device", "gone_with_the_wind.backend:load")
    completed = subprocess.run(
        [sys.executable, "-c", "from moelora_cli.main import main; main()", "doctor"],
        env={**os.environ, "PYTHONPATH": str(site), "COLUMNS": "300"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert completed.returncode == 0, completed.stderr
    (line,) = (line for line in completed.stdout.splitlines() if "gone_with_the_wind" in line)
    for said in ("missing", "pip uninstall somebody-s-device", "TORCH_DEVICE_BACKEND_AUTOLOAD=0"):
        assert said in line
    (line,) = (line for line in completed.stdout.splitlines() if "PEFT type MOELORA" in line)
    assert " ok " in line  # the rest is looked at all the same


@pytest.mark.parametrize("error", ["RuntimeError('broken')", "SystemExit(3)", "ImportError('x')"])
def test_a_hook_that_breaks_is_noted(error: str) -> None:
    """Of the hooks the first is served at once, as its module is there."""
    program = f"""
        import types
        from moelora_plugin import autoload
        module = types.ModuleType("moelora_plugin.breaks")
        def breaks():
            raise {error}
        module.breaks = breaks
        sys.modules["moelora_plugin.breaks"] = module
        sys.modules["peft.mapping_func"] = types.ModuleType("peft.mapping_func")
        autoload.HOOKS["peft.mapping_func"] = "breaks:breaks"
        sys.meta_path[:] = [one for one in sys.meta_path if type(one).__name__ != "_HookFinder"]
        autoload.install()
        print(list(autoload.failures))
    """
    # The package from where this test has it.
    home = Path(autoload.__file__).parents[1]
    completed = python(program, home, MOELORA_AUTOLOAD="1")
    assert completed.stdout == "['peft.mapping_func']\n", completed.stderr


def test_an_activation_that_breaks_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("a module that cannot be asked")

    monkeypatch.setattr(autoload, "activate", fail)
    monkeypatch.setattr(autoload, "failures", {})
    monkeypatch.setenv(autoload.ENVIRONMENT_SWITCH, "1")
    autoload.install()
    assert "cannot be asked" in autoload.failures["activation"]
