"""Writing files so that a crash leaves the old thing or the new thing, never half of one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ConfigError


def refuse_existing(out: Path | str, *, overwrite: bool, key: str = "--out") -> None:
    """Refuse an output that holds something or cannot be made, before any time is spent on it.

    Args:
        out: a folder or file to be made.
        overwrite: the user said it may go.
        key: the option that names `out`, for the message.

    Raises:
        ConfigError: it holds something and may not go, or nothing can be written at its place.
    """
    path = Path(out)
    occupied = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if occupied and not overwrite:
        raise ConfigError(
            f"{path} already holds something; choose another {key} or pass --overwrite."
        )
    place = next(folder for folder in path.absolute().parents if os.path.exists(folder))
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ConfigError(
            f"{path} cannot be written, since {place} is not a folder that can be written to; "
            f"choose another {key}."
        )


@contextmanager
def atomic_directory(out: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder under a temporary name beside `out`, renamed to `out` if the block succeeds.

    Raises:
        ConfigError: `out` holds something and `overwrite` is False.
    """
    path = Path(out)
    refuse_existing(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield temporary
        # mkdtemp makes a private folder and safetensors private files; what is shared should be
        # as readable as anything else the user writes.
        for made in (temporary, *temporary.rglob("*")):
            made.chmod((0o777 if made.is_dir() else 0o666) & ~_umask())
        replaced = temporary.with_suffix(".replaced")
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
        if replaced.is_file() or replaced.is_symlink():
            replaced.unlink()
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole: under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole, in a stable and readable form."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def cache_folder() -> Path:
    """Where we keep what can be made again: MOELORA_CACHE, or moelora in the user's cache."""
    chosen = os.environ.get("MOELORA_CACHE")
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(chosen or Path(root) / "moelora").expanduser()


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
