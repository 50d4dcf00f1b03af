"""`moelora launch`, in processes of their own: what it starts is activated, and its workers too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import moelora_plugin
from moelora_cli.main import app
from moelora_plugin.launch import SITE, environment

SWITCHES = ("MOELORA_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD")
MAIN = "from moelora_cli.main import main; main()"
ACTIVE = (
    "import sys; hooks = sys.modules.get('moelora_plugin.autoload'); "
    "print(bool(hooks) and hooks.installed(), flush=True)"
)
# Prints its own state, then that of a worker that it starts.
PARENT = f"{ACTIVE}; import subprocess; subprocess.run([sys.executable, '-c', {ACTIVE!r}])"


def launch(
    *command: str, cwd: Path, switches: tuple[str, ...] = SWITCHES, **variables: str
) -> subprocess.CompletedProcess[str]:
    ours = {key for key in os.environ if key.startswith(("MOELORA_", "PYTHON"))}
    return subprocess.run(
        [sys.executable, "-c", MAIN, "launch", *command],
        env={
            **{key: value for key, value in os.environ.items() if key not in ours},
            **dict.fromkeys(switches, "0"),
            **variables,
        },
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_command_and_its_worker(switch: str, tmp_path: Path) -> None:
    done = launch(sys.executable, "-c", PARENT, cwd=tmp_path, switches=(switch,))
    assert (done.stdout, done.stderr) == ("True\nTrue\n", "")


def test_without_it_nothing_is_activated(tmp_path: Path) -> None:
    """What the other tests would see if they tested nothing."""
    command = [sys.executable, "-c", PARENT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "False\nFalse\n"


def test_a_worker_that_imports_torch_first(tmp_path: Path) -> None:
    worker = "import torch, peft; print(*peft.PeftType.__members__)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    done = launch(sys.executable, "-c", parent, cwd=tmp_path)
    assert "MOELORA" in done.stdout.split(), done.stderr


def test_an_environment_that_does_not_have_us(tmp_path: Path) -> None:
    """The interpreter behind the virtual environment: no moelora, and no torch either."""
    bare = getattr(sys, "_base_executable", sys.executable)
    imported = "import moelora_plugin, moelora_eval_tasks.catalog; print(moelora_plugin.__file__)"
    done = subprocess.run([bare, "-c", imported], cwd=tmp_path, capture_output=True, text=True)
    if done.returncode == 0:
        pytest.skip("the interpreter behind this environment has moelora")
    done = launch(bare, "-c", f"{imported}; {PARENT}", cwd=tmp_path)
    assert done.stdout.splitlines() == [moelora_plugin.__file__, "True", "True"], done.stderr


@pytest.mark.parametrize("broken", [False, True])
def test_another_sitecustomize_runs_too(broken: bool, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "sitecustomize.py").write_text(
        "print('theirs', __name__, flush=True)\n" + "raise ValueError('their own')\n" * broken
    )
    check = "import sitecustomize; print(sitecustomize.__file__)"
    theirs = str(tmp_path / "theirs")
    command = (sys.executable, "-c", f"{ACTIVE}; {check if not broken else ''}")
    done = launch(*command, cwd=tmp_path, PYTHONPATH=theirs)
    # The first line is that of `moelora` itself, which is a Python too.
    lines = ["theirs sitecustomize"] * 2 + ["True"]
    assert done.stdout.splitlines()[:3] == lines, done.stderr
    if broken:
        assert done.stderr.count("their own") == 2
    else:
        assert done.stdout.splitlines()[3:] == [f"{theirs}{os.sep}sitecustomize.py"]


def test_a_broken_installation_says_so_and_the_command_runs(tmp_path: Path) -> None:
    (tmp_path / "moelora_plugin").mkdir()
    (tmp_path / "moelora_plugin" / "__init__.py").write_text("raise RuntimeError('half installed')")
    script = tmp_path / "script.py"  # its folder is not on the path yet when it is activated
    script.write_text("print('ran')")
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment({**os.environ, "PYTHONPATH": str(tmp_path)}),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert done.stderr == "moelora launch: not activated, RuntimeError: half installed\n"


def test_options_and_exit_code_are_the_command_s(tmp_path: Path) -> None:
    program = "import sys; print(sys.argv[1:]); sys.exit(7)"
    options = ["--help", "-x", "--debug", "--", "--version"]
    done = launch(sys.executable, "-c", program, *options, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (7, f"{options}\n")


@pytest.mark.parametrize(
    ("command", "reason"),
    [("no-such-command", "no such command on PATH"), ("./notes.txt", "Permission denied")],
)
def test_a_command_that_cannot_run(command: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a program")
    done = launch(command, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: Cannot launch '{command}': ")
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_command() -> None:
    result = CliRunner().invoke(app, ["launch"])
    assert result.exit_code == 2
    assert "COMMAND" in result.output


def test_the_environment_s_own_path_stays_behind_ours() -> None:
    assert environment({})["PYTHONPATH"] == SITE
    once = environment({"PYTHONPATH": os.pathsep.join(["a", "", "b"]), "HOME": "h"})
    assert once == {"PYTHONPATH": os.pathsep.join([SITE, "a", "", "b"]), "HOME": "h"}
    assert environment(once) == once
