"""`--help` loads no heavy library and ends with examples; benchmarks/startup.py times it."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMMANDS = (
    *("train", "eval", "export", "demo", "init", "tasks", "presets", "inspect", "cluster"),
    *("path", "doctor", "launch", "plan", "compare", "data", "report"),
)

HEAVY = ("torch", "transformers", "peft", "datasets", "lm_eval", "numpy", "matplotlib")

# Fails inside the process that ran the command, where sys.modules tells what was loaded.
PROGRAM = f"""
import sys
from moelora_cli.main import main
try:
    main()
finally:
    loaded = [name for name in {HEAVY} if name in sys.modules]
    assert not loaded, loaded
"""


def moelora(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_loads_nothing_heavy(command: str) -> None:
    completed = moelora(command, "--help")
    assert completed.returncode == 0, completed.stderr
    assert f"moelora {command}" in completed.stdout.partition("Examples:")[2]


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("tasks",), ("presets",)])
def test_light_commands_load_nothing_heavy(arguments: tuple[str, ...]) -> None:
    completed = moelora(*arguments)
    assert completed.returncode == 0, completed.stderr


def test_debug_works_at_the_end_of_the_line() -> None:
    completed = moelora("presets", "nothing_like_it", "--debug")
    assert completed.returncode != 0
    assert "ConfigError" in completed.stderr
