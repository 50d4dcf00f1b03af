"""`moelora path` names files that are there, and imports nothing heavy for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from moelora_cli.main import app

PROGRAM = """
import sys
from moelora_cli.main import main
try:
    main()
finally:
    assert not {"torch", "peft", "transformers", "swift"} & set(sys.modules)
"""


def test_a_path_on_a_line_of_its_own_however_long() -> None:
    completed = subprocess.run(
        [sys.executable, "-c", PROGRAM, "path", "ms-swift"],
        env={"COLUMNS": "20"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert completed.returncode == 0, completed.stderr
    (line,) = completed.stdout.splitlines()
    assert Path(line).is_absolute()
    assert Path(line).name == "external_plugin.py"
    assert "moelora" in Path(line).read_text("utf-8")


def test_the_list() -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["path"])
    assert result.exit_code == 0, result.output
    assert "ms-swift" in result.output
    assert "external_plugin.py" in result.output


def test_an_unknown_name() -> None:
    result = CliRunner().invoke(app, ["path", "swift"])
    assert result.exit_code == 1
    assert result.stderr == "Error: Unknown file 'swift'; did you mean 'ms-swift'?\n"
