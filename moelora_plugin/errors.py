"""Errors a user can cause.

Each message is one sentence: what was got, what was expected, which key to change.
The CLI prints it in red and exits with 1; everything else is a bug and keeps its traceback.

    MoeLoraError
    ├── ConfigError         a config, recipe or command line asks for something impossible
    ├── DataError           a dataset file, column or label is not what a task needs
    ├── AdapterError        a saved adapter is damaged, incomplete or does not belong to its base
    ├── ExportError         an export that cannot be done as asked
    └── MissingDependencyError   a package, file or network connection is not there
"""

from __future__ import annotations

from .text import sentence


class MoeLoraError(Exception):
    """Base of every error that a user can cause and mend.

    What it says may hold names out of files and what other libraries say of them, so it is made
    harmless and short here, for terminals and logs alike.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(sentence(message))


class ConfigError(MoeLoraError, ValueError):
    """A configuration that cannot be carried out."""


class DataError(MoeLoraError, ValueError):
    """Data that does not have the files, columns or labels a task needs."""


class AdapterError(MoeLoraError, ValueError):
    """A saved adapter that is damaged, incomplete or belongs to another base."""


class ExportError(MoeLoraError, ValueError):
    """An export or merge that cannot be done as asked."""


class MissingDependencyError(MoeLoraError, RuntimeError):
    """A package, file or network connection the work needs is not there."""


class ReachWarning(UserWarning):
    """An adapter reaches less of its base than its configuration may lead one to think."""


def first_line(error: Exception) -> str:
    """What another library's error says, as part of one of our sentences.

    Its first line without the full stop; the pages that often follow help nobody. A first line that
    ends with a colon announces the next, which has the names and sizes.
    """
    first, *rest = (str(error).strip() or type(error).__name__).splitlines()
    if first.endswith(":") and rest:
        first = f"{first} {rest[0].strip()}"
    return first.rstrip(".")
