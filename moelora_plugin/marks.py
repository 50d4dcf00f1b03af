"""Which files of a folder are ours: those that a mark in it lists, as long as nobody changed them.

A mark is a small file beside what we wrote. By it `--overwrite` knows what it may replace; every
other file, a changed one of ours too, is somebody's and stays.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .reading import read_json

MARK = ".moelora.json"

_ABOUT = "moelora wrote these files. --overwrite replaces them as long as they are unchanged."
# Beyond it the size alone tells a file: nobody edits weights by hand, and hashing them would take
# as long as writing them does.
_HASHED = 16 * 2**20  # bytes

_TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
    *("chat_template.jinja", "processor_config.json", "preprocessor_config.json"),
)
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def _has(name: str, key: str, value: Any = None) -> Callable[[Path], bool]:
    """Whether a folder has a JSON file with a key (and value)."""

    def found(folder: Path) -> bool:
        try:
            content = read_json(folder / name, remedy="")
        except ConfigError:
            return False
        return key in content if value is None else content.get(key) == value

    return found


def _is_checkpoint(folder: Path) -> bool:
    is_ours = _has("adapter_config.json", "peft_type", "MOELORA")
    return is_ours(folder) and _has("trainer_state.json", "global_step")(folder)


def _is_run(folder: Path) -> bool:
    if _has("adapter/moelora.json", "weights_sha256")(folder):
        return (folder / "log_history.json").is_file()
    found = list((folder / "checkpoints").glob("checkpoint-*"))
    return bool(found) and all(map(_is_checkpoint, found))


# What versions that left no mark wrote into a folder that can be told
# by its manifest. A README.md of an adapter or export is not among it: many are written by hand.
_WITHOUT_MARK: tuple[tuple[Callable[[Path], bool], tuple[str, ...]], ...] = (
    (_has("moelora.json", "weights_sha256"), ("moelora.json", *_ADAPTER, *_TOKENIZER)),
    (
        _has("moelora_export.json", "adapter_sha256"),
        (
            *("moelora_export.json", "config.json", "generation_config.json"),
            *("model.safetensors", "model-?????-of-?????.safetensors"),
            *("model.safetensors.index.json", *_TOKENIZER),
        ),
    ),
    (_has("clusters.json", "centroids_sha256"), ("clusters.json", "clusters.safetensors")),
    (
        _is_checkpoint,
        (
            *("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json"),
            *("training_args.bin", "README.md", *_ADAPTER, *_TOKENIZER),
        ),
    ),
    (_is_run, ("log_history.json",)),
)


def write_mark(folder: Path, names: Iterable[str] | None = None) -> None:
    """Mark files of a folder as ours, as they are now.

    Args:
        folder: the folder; one that has a mark already keeps what that lists.
        names: paths in it; None takes every file that it holds.
    """
    if names is None:
        names = [path.relative_to(folder).as_posix() for path in _files(folder)]
    listed = {**_listed(folder), **{name: _seal(folder / name) for name in names if name != MARK}}
    content = json.dumps({"about": _ABOUT, "files": listed}, indent=2, sort_keys=True)
    temporary = folder / f"{MARK}.{os.getpid()}.partial"
    temporary.write_text(f"{content}\n", encoding="utf-8")
    temporary.replace(folder / MARK)


def is_marked(folder: Path) -> bool:
    """Whether we made the folder."""
    if os.path.lexists(folder / MARK) and _has(MARK, "files")(folder):
        return True
    return any(tells(folder) for tells, _ in _WITHOUT_MARK)


def own_files(folder: Path) -> set[str]:
    """The files in a folder that we wrote and nobody has changed, by their paths in it."""
    listed = _listed(folder)
    if listed or os.path.lexists(folder / MARK):
        there = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
        own = {
            name for name, seal in listed.items() if name in there and _seal(there[name]) == seal
        }
        return own | ({MARK} & there.keys())
    patterns = [name for tells, names in _WITHOUT_MARK if tells(folder) for name in names]
    there = {path.name: path for path in _files(folder) if path.parent == folder}
    return {name for name in there if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _listed(folder: Path) -> dict[str, str]:
    """What the mark lists; nothing where there is none that can be read."""
    if not os.path.lexists(folder / MARK):
        return {}
    try:
        files = read_json(folder / MARK, remedy="").get("files")
    except ConfigError:
        return {}
    if not isinstance(files, dict):
        return {}
    return {name: seal for name, seal in files.items() if isinstance(seal, str)}


def _files(folder: Path) -> Iterator[Path]:
    """The regular files below a folder; what a link leads to is not in it."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                yield path


def _seal(path: Path) -> str | None:
    """What tells whether a file is still as we wrote it; None where it cannot be read."""
    try:
        size = path.stat().st_size
        if size > _HASHED:
            return f"{size} bytes"
        return f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"
    except OSError:
        return None
