"""Writing files and folders: whole or not at all, and over nothing that is not ours.

What is in the way is replaced only where we wrote it ourselves and the user said `--overwrite`: a
folder by its mark (`marks`), a file by what it holds. Everything else stays where it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ConfigError, first_line
from .marks import MARK, is_marked, own_files, write_mark
from .text import plain

logger = logging.getLogger(__name__)

_NAMED = 3  # files that a sentence names


def check_out_folder(
    out: Path | str, *, overwrite: bool, key: str = "--out", is_whole: bool = True
) -> Path:
    """Refuse a folder that cannot be made or replaced, before any time is spent on it.

    Args:
        out: the folder to be made.
        overwrite: the user said that what we wrote there before may go.
        key: the option that names `out`, for the message.
        is_whole: whether it is to be replaced as a whole; else files are written into it.

    Returns:
        The folder, without links in its path.

    Raises:
        ConfigError: it holds something that may not go, or nothing can be written at its place.
    """
    path = _resolved(out, key)
    if os.path.lexists(path) and not path.is_dir():
        raise ConfigError(
            f"{out} is a file, which not even --overwrite replaces by a folder; choose another "
            f"{key}."
        )
    if path.is_dir():
        _refuse_folder(path, out, overwrite, key)
        if is_whole and (path.is_mount() or _is_around_us(path)):
            raise ConfigError(
                f"{out} is a mount point or holds the current folder, so it cannot be replaced as "
                f"a whole; name a folder in it with {key}."
            )
    _refuse_place(path, out, key)
    return path


def check_out_file(
    out: Path | str, *, overwrite: bool, is_ours: Callable[[Path], bool], key: str = "--out"
) -> Path:
    """Refuse a file that cannot be written or replaced, before any time is spent on it.

    Args:
        out: the file to be written.
        overwrite: the user said that what we wrote there before may go.
        is_ours: whether a file is what the command writes; it may raise what our readers raise.
        key: the option that names `out`, for the message.

    Returns:
        The file, without links in its path.

    Raises:
        ConfigError: something is there that may not go, or nothing can be written at its place.
    """
    path = _resolved(out, key)
    if path.is_dir():
        raise ConfigError(f"{out} is a folder and a file is to be written; name one with {key}.")
    if os.path.lexists(path):
        if not path.is_file():
            raise ConfigError(f"{out} is no regular file; choose another {key}.")
        if path.stat().st_size and not _holds(path, is_ours):
            raise ConfigError(
                f"{out} already holds something that this command did not write, which not even "
                f"--overwrite replaces; choose another {key}."
            )
        if not overwrite:
            raise ConfigError(
                f"{out} already holds something; choose another {key} or pass --overwrite."
            )
    _refuse_place(path, out, key)
    return path


@contextmanager
def atomic_directory(out: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder under a temporary name beside `out`, put at its place if the block succeeds.

    What is ours of a folder that is there is replaced. What is not stays in it, under its own name
    or, where the new folder needs that, under `NAME.old`.

    Raises:
        ConfigError: `out` holds something and `overwrite` is False, or it is not ours.
    """
    path = check_out_folder(out, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_folder(path, ".partial")
    try:
        yield temporary
        # mkdtemp makes a private folder and safetensors private files; what is shared should be
        # as readable as anything else the user writes.
        for made in (temporary, *temporary.rglob("*")):
            made.chmod((0o777 if made.is_dir() else 0o666) & ~_umask())
        put_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_folder(new: Path, path: Path) -> None:
    """Mark a folder of ours and put it at its place; see `atomic_directory` for what is there.

    The old folder goes only when the new one is in its place, and comes back if that fails.
    """
    write_mark(new)
    if not os.path.lexists(path):
        new.rename(path)
        return
    own = own_files(path)
    aside = _temporary_folder(path, ".replaced")
    aside.rmdir()  # its name is taken; not every system renames over a folder
    path.rename(aside)
    try:
        new.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    try:
        kept = list(_give_back(aside, path, own))
    except OSError as error:  # somebody's folder that we may not move
        logger.warning("%s", plain(f"What {path} held of others is in {aside}: {error}."))
        return
    if kept:
        logger.warning("%s", plain(f"Left in {path}, as moelora did not write it: {_some(kept)}."))


def set_aside(path: Path) -> Path:
    """Rename what is there to `NAME.old`; returns its new place."""
    kept = _free_name(path)
    path.rename(kept)
    return kept


def remove_own(folder: Path) -> bool:
    """Remove what is ours of a folder, and the folders that are empty then.

    Returns:
        Whether anything is left.
    """
    for name in own_files(folder):
        (folder / name).unlink()
    for parent, _, _ in os.walk(folder, topdown=False):
        if not os.path.islink(parent) and not os.listdir(parent):
            os.rmdir(parent)
    return folder.exists()


def remove_if_bare(folder: Path) -> None:
    """Remove a folder that holds nothing but our mark."""
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {MARK}:
        (folder / MARK).unlink(missing_ok=True)
        folder.rmdir()


@contextmanager
def file_in(folder: Path, name: str) -> Iterator[Path]:
    """A file of a marked folder, to be written in the block and then marked as ours.

    What has the name and is not ours is kept as `NAME.old`.

    Args:
        folder: the folder; it need not be there.
        name: path in it.
    """
    path = folder / name
    if os.path.lexists(path) and name not in own_files(folder):
        kept = set_aside(path)
        logger.warning("%s", plain(f"Kept as {kept}, as moelora did not write it: {path}."))
    with whole_file(path) as temporary:
        yield temporary
    write_mark(folder, [name])


def write_text_in(folder: Path, name: str, text: str) -> None:
    """Write a text file into a marked folder; see `file_in`."""
    with file_in(folder, name) as path:
        _write(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole: under a temporary name first."""
    with whole_file(path) as temporary:
        _write(temporary, text)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole, in a stable and readable form."""
    write_text(path, json_text(content))


def json_text(content: Any) -> str:
    """JSON in a stable and readable form."""
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file under a temporary name beside `path`, which takes its place if the block succeeds."""
    path = Path(os.path.realpath(path))  # through a link, as any program writes
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        prefix=f".{path.name[:100]}.", suffix=".partial", dir=path.parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def _resolved(out: Path | str, key: str) -> Path:
    try:
        return Path(out).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a name with a NUL
        raise ConfigError(
            f"{out} cannot be written ({first_line(error)}); choose another {key}."
        ) from error


def _refuse_folder(path: Path, out: Path | str, overwrite: bool, key: str) -> None:
    """Refuse a folder that is there and must stay."""
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be read ({first_line(error)}); choose another {key}."
        ) from error
    if names and not is_marked(path):
        raise ConfigError(
            f"{out} already holds something that moelora did not write ({_some(names)}), which not "
            f"even --overwrite replaces; choose another {key}."
        )
    if names and not overwrite:
        raise ConfigError(
            f"{out} already holds something; choose another {key} or pass --overwrite."
        )


def _is_around_us(path: Path) -> bool:
    """Whether a folder is the current one or holds it."""
    try:
        return Path.cwd().is_relative_to(path)
    except OSError:  # the current folder is gone
        return False


def _refuse_place(path: Path, out: Path | str, key: str) -> None:
    """Refuse a place where nothing can be written."""
    place = next(folder for folder in path.parents if os.path.lexists(folder))
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ConfigError(
            f"{out} cannot be written, since {place} is not a folder that can be written to; "
            f"choose another {key}."
        )


def _holds(path: Path, is_ours: Callable[[Path], bool]) -> bool:
    try:
        return is_ours(path)
    except ConfigError:
        return False


def _temporary_folder(path: Path, suffix: str) -> Path:
    name = tempfile.mkdtemp(prefix=f".{path.name[:100]}.", suffix=suffix, dir=path.parent)
    return Path(name)


def _give_back(old: Path, new: Path, own: set[str], below: str = "") -> Iterator[str]:
    """Move what is not ours from the old folder into the new one, and remove the rest.

    Yields:
        The names that were moved, as they are in the new folder.
    """
    # First what keeps its name, so that no NAME.old takes it.
    entries = sorted(os.scandir(old), key=lambda entry: entry.name)
    for entry in sorted(entries, key=lambda entry: os.path.lexists(new / entry.name)):
        name, there = f"{below}{entry.name}", new / entry.name
        source = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            if there.is_dir() or any(one.startswith(f"{name}/") for one in own):
                place = _free_name(there) if there.is_file() else there
                place.mkdir(exist_ok=True)
                yield from _give_back(source, place, own, f"{name}/")
                if not any(place.iterdir()):
                    place.rmdir()
                continue
        elif name in own:
            source.unlink()
            continue
        place = _free_name(there) if os.path.lexists(there) else there
        source.rename(place)
        yield f"{below}{place.name}"
    old.rmdir()


def _free_name(path: Path) -> Path:
    """The first of NAME.old, NAME.old2, ... that is not there."""
    numbers = ("", *map(str, range(2, 10_000)))
    names = (path.with_name(f"{path.name}.old{number}") for number in numbers)
    return next(name for name in names if not os.path.lexists(name))


def _some(names: list[str]) -> str:
    """The first of the names, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _write(path: Path, text: str) -> None:
    # Half of a surrogate pair, which some files have in names, is written as JSON escapes it.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
