"""Reading files that others may have made: bounded, regular files only, and never a traceback."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ConfigError, MoeLoraError, first_line

MANIFEST_BYTES = 64 * 2**20  # more than the routing of any model; a bound for what is no manifest
DEPTH = 100  # of lists and mappings in each other; ours are less than ten deep


class Unreadable(ValueError):
    """Why a file cannot be read: what one of our sentences says of it ("is no regular file")."""


def read_bytes(path: Path, most: int = MANIFEST_BYTES) -> bytes:
    """The content of a regular file.

    Args:
        path: the file; a pipe or a device, which may never end, is refused.
        most: bytes.

    Raises:
        Unreadable: it is not there, is no regular file, or is larger.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise Unreadable("is no regular file")
        if status.st_size > most:
            raise Unreadable(f"has {status.st_size:,} bytes, of which at most {most:,} are read")
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror or first_line(error)})") from error
    if len(content) > most:  # of some files the system does not know the size
        raise Unreadable(f"has more than {most:,} bytes")
    return content


def read_text(path: Path, most: int = MANIFEST_BYTES) -> str:
    """The content of a regular file as text; see `read_bytes`.

    Raises:
        Unreadable: as there, or it is not UTF-8.
    """
    return _decode(read_bytes(path, most))


def parse_json(content: bytes) -> Any:
    """JSON's value.

    Raises:
        Unreadable: it is not UTF-8, not JSON, or nested more than `DEPTH` deep.
    """
    try:
        value = json.loads(_decode(content))
    except RecursionError:
        raise Unreadable("is nested too deeply") from None
    except Unreadable:
        raise
    except ValueError as error:
        raise Unreadable(f"is not valid JSON ({first_line(error)})") from error
    if is_deep(value):
        raise Unreadable("is nested too deeply")
    return value


def read_json(
    path: Path,
    *,
    remedy: str,
    error: type[MoeLoraError] = ConfigError,
    most: int = MANIFEST_BYTES,
) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.
        remedy: what to do where it cannot be read, for the message.
        error: what to raise then.
        most: bytes of the file.

    Raises:
        MoeLoraError: `error`: no such file, or no JSON object in it.
    """
    try:
        content = parse_json(read_bytes(path, most))
    except Unreadable as reason:
        raise error(f"{path} {reason}; {remedy}.") from reason
    if not isinstance(content, dict):
        raise error(f"{path} holds a {type(content).__name__}, not an object; {remedy}.")
    return content


def is_deep(value: Any) -> bool:
    """Whether lists and mappings stand in each other more than `DEPTH` deep; finds circles too."""
    level = [value] if isinstance(value, (Mapping, list)) else []
    for _ in range(DEPTH):
        level = [
            child
            for one in level
            for child in (one.values() if isinstance(one, Mapping) else one)
            if isinstance(child, (Mapping, list))
        ]
        if not level:
            return False
    return True


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise Unreadable("is not UTF-8 text") from error
