"""`moelora launch`: a command with the hooks active although no entry point would load them.

Python imports a module `sitecustomize` when it starts. The folder `site` beside this file holds
one, and PYTHONPATH, which workers inherit, brings it to the command and to every Python it starts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from ..errors import ConfigError, first_line

SITE = str(Path(__file__).absolute().parent / "site")


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment in which a command, and what it starts, is activated."""
    path = inherited.get("PYTHONPATH")
    others = [folder for folder in path.split(os.pathsep) if folder != SITE] if path else []
    return {**inherited, "PYTHONPATH": os.pathsep.join([SITE, *others])}


def launch(command: Sequence[str]) -> NoReturn:
    """Become `command`, activated; its exit code is this process's.

    Raises:
        ConfigError: there is no such command.
    """
    try:
        os.execvpe(command[0], list(command), environment(os.environ))
    except OSError as error:
        reason = (
            "there is no such command on PATH; activate the environment that has it"
            if isinstance(error, FileNotFoundError)
            else first_line(error)
        )
        raise ConfigError(f"Cannot launch {command[0]!r}: {reason}.") from error
