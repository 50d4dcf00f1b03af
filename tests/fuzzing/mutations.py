"""How an artefact is damaged: a mutant is a few changes of one file, by number and seed."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

# A value may be replaced with any of these, and with what `Poison` adds.
_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    7,
    0.5,
    10**9,
    3_000_000,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "none",
    "all-linear",
    "a" * 100_000,
    [],
    {},
    [None],
    [[]],
    {"a": None},
    ["q_proj", 3],
    list(range(5000)),
)
_HOSTILE = (
    "\x1b[2J\x1b[31mred",
    "\x1b]8;;http://example.org\x07link\x1b]8;;\x07",
    "[bold red]markup[/]",
    "[/]",
    "<script>alert(1)</script>",
    "a|b\nc: d\n---\n# Title",
    "![x](http://example.org/x.png)",
    "\u202egnp.exe",
    "\x00\x07\x9b31m",
    "\ud800",
)
_PATTERNS = ("(a+)+$", "(.*)*x", "(a|aa)+$", "((a*)*)*b", "(.+)+(.+)+!", "[", "*", "(?P<")
_CALLABLES = (
    "os.system",
    "subprocess.Popen",
    "builtins.exec",
    "builtins.eval",
    "cProfile.run",
    "torch.save",
    "pathlib.Path.touch",
    "torch.nn.Linear",
    "fuzz_payload.Part",
    "fuzz_payload.part",
    "fuzz_payload",
)
_NAMING_KEYS = (
    "site",
    "router",
    "router_score",
    "router_input",
    "expert",
    "allocation",
    "init",
    "scale",
)
_OPTION_KEYS = (
    "site_kwargs",
    "router_kwargs",
    "router_score_kwargs",
    "router_input_kwargs",
    "router_modifiers",
    "expert_kwargs",
    "allocation_kwargs",
    "init_kwargs",
    "aux_losses",
)
_RAW = (
    *("truncate", "flip", "flip", "insert", "empty", "bom", "binary", "deep"),
    *("folder", "fifo", "link", "zero", "missing"),
)
_TENSORS = (
    *("nan", "inf", "scale", "swap", "zero", "drop", "rename"),
    *("dtype", "shape", "offsets", "header", "length", "extra"),
)


@dataclass(frozen=True)
class Poison:
    """Values that depend on where the run takes place.

    Attributes:
        canary: a folder that nothing may touch.
        by_person: whether a person has written the file, who may name code by its dotted path.
        is_stock: whether a library's loader opens the file before it asks us: it waits for a pipe.
    """

    canary: Path
    by_person: bool = False
    is_stock: bool = False

    @property
    def command(self) -> str:
        """Python that leaves a trace."""
        return f"open({str(self.canary / 'RAN')!r}, 'w').close()"

    def paths(self) -> list[str]:
        """Paths that must not be opened."""
        return [str(self.canary / "secret.json"), str(self.canary), "/dev/zero", "/etc/passwd"]

    def value(self, rng: random.Random) -> Any:
        """Any of them."""
        kind = rng.randrange(10)
        if kind < 5:
            return copy.deepcopy(rng.choice(_VALUES))
        if kind == 5:
            return rng.choice(_HOSTILE)
        if kind == 6:
            return rng.choice(_PATTERNS)
        if kind == 7:
            return rng.choice(self.paths())
        if kind == 8:
            deep: Any = 0
            for _ in range(rng.choice((3, 50, 400))):
                deep = [deep] if rng.random() < 0.5 else {"a": deep}
            return deep
        return self.callable(rng)

    def callable(self, rng: random.Random) -> str:
        """The name of something that must not be called."""
        names = [n for n in _CALLABLES if not (self.by_person and n.startswith("fuzz_payload"))]
        return rng.choice(names)


@dataclass(frozen=True)
class Mutant:
    """A damaged copy of an artefact.

    Attributes:
        what: the change, for the report.
        keeps_form: whether only values of tensors changed, which no loader but ours can tell.
    """

    what: str
    keeps_form: bool = False


def mutate(folder: Path, files: list[str], rng: random.Random, poison: Poison) -> Mutant:
    """Damage one of the files of an artefact's copy, or several of its values."""
    name = rng.choice(files)
    path = folder / name
    if rng.random() < 0.12:
        return _raw(path, rng, poison)
    if path.suffix == ".safetensors":
        return _tensors(path, rng, poison)
    if path.suffix == ".json":
        return _document(path, rng, poison, json.loads, json.dumps)
    if path.suffix == ".yaml":
        return _document(path, rng, poison, yaml.safe_load, yaml.safe_dump)
    return _raw(path, rng, poison)


def _document(
    path: Path,
    rng: random.Random,
    poison: Poison,
    read: Callable[[str], Any],
    write: Callable[[Any], str],
) -> Mutant:
    content = read(path.read_text())
    said = []
    for _ in range(1 if rng.random() < 0.8 else rng.randint(2, 3)):
        content, what = _change(content, rng, poison, is_config=path.name == "adapter_config.json")
        said.append(what)
    try:
        text = write(content)
    except (RecursionError, ValueError, yaml.YAMLError):
        text = "[" * 20_000
        said = ["deep nesting"]
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return Mutant(f"{path.name}: {'; '.join(said)}")


def _change(content: Any, rng: random.Random, poison: Poison, is_config: bool) -> tuple[Any, str]:
    """One change of a JSON or YAML value."""
    if is_config and rng.random() < 0.35:
        return _named(content, rng, poison)
    places = list(_places(content))
    if not places:
        return poison.value(rng), "the whole document"
    holder, key = rng.choice(places)
    at, old = f"[{key!r}]", holder[key]
    op = rng.choice(("replace", "replace", "replace", "nudge", "delete", "wrap", "rename", "add"))
    if op == "nudge":
        holder[key] = _nudged(old, rng)
    elif op == "delete":
        del holder[key]
    elif op == "wrap":
        holder[key] = [old] if rng.random() < 0.5 else {"value": old}
    elif op == "rename" and isinstance(holder, dict):
        holder[_nudged(str(key), rng)] = holder.pop(key)
    elif op == "add" and isinstance(holder, dict):
        new = rng.choice(("fuzz", *_HOSTILE[:3], "__class__", f"{key}s"))
        holder[new] = poison.value(rng)
    else:
        holder[key] = poison.value(rng)
    return content, f"{op} {at} (was {old!r:.40})"


def _named(content: dict[str, Any], rng: random.Random, poison: Poison) -> tuple[Any, str]:
    """Names of code, options and paths where a configuration takes names."""
    kind = rng.randrange(4)
    if kind == 0:
        key = rng.choice(_NAMING_KEYS)
        content[key] = poison.callable(rng)
        return content, f"{key}={content[key]}"
    if kind == 1:
        key = rng.choice(("router_modifiers", "aux_losses"))
        name = poison.callable(rng)
        content[key] = {name: rng.choice((poison.command, 0.5, {"coefficient": 0.5}, [1]))}
        return content, f"{key} {name}"
    if kind == 2:
        key = rng.choice(_OPTION_KEYS)
        option = rng.choice(("path", "paths", "subtract", "modules", "block", "share", "r", "fuzz"))
        content[key] = {option: poison.value(rng)}
        return content, f"{key}[{option}]={content[key][option]!r:.40}"
    key, value = rng.choice(
        (
            ("allocation_kwargs", {"path": rng.choice(poison.paths())}),
            ("init_kwargs", {"paths": [rng.choice(poison.paths())] * 4}),
            ("base_model_name_or_path", rng.choice(poison.paths())),
            ("target_modules", rng.choice(_PATTERNS)),
            ("exclude_modules", rng.choice(_PATTERNS)),
            ("num_experts", rng.choice((10**9, 3_000_000, 10**30))),
            ("r", rng.choice((10**9, 3_000_000))),
            ("auto_mapping", {"base_model_class": "Part", "parent_library": "fuzz_payload"}),
        )
    )
    content[key] = value
    if key == "allocation_kwargs":
        content["allocation"] = "modules"
    if key == "init_kwargs":
        content["init"] = "adapters"
    return content, f"{key}={value!r:.60}"


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of every value inside."""
    items: Any = ()
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, list):
        items = enumerate(content[:50])
    for key, value in list(items):
        yield content, key
        yield from _places(value)


def _nudged(value: Any, rng: random.Random) -> Any:
    """A value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + rng.choice((-1, 1, 2))
    if isinstance(value, float):
        return value * rng.choice((0.5, 1.5, -1.0))
    if isinstance(value, str) and value:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice("xq0 ") + value[at + 1 :]
    if isinstance(value, list) and value:
        return value[:-1]
    return [value]


def _raw(path: Path, rng: random.Random, poison: Poison) -> Mutant:
    """The file as bytes, or something else in its place."""
    data = path.read_bytes()
    op = rng.choice(_RAW)
    if op in ("fifo", "zero") and poison.is_stock:
        op = "folder"
    if op == "truncate":
        data = data[: rng.randrange(len(data))]
    elif op == "flip":
        at = rng.randrange(len(data))
        data = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    elif op == "insert":
        at = rng.randrange(len(data))
        data = data[:at] + rng.randbytes(rng.randint(1, 9)) + data[at:]
    elif op == "bom":
        data = b"\xef\xbb\xbf" + data
    elif op == "binary":
        data = rng.randbytes(500)
    elif op == "deep":
        data = rng.choice((b"[", b'{"a":')) * 100_000
    elif op == "empty":
        data = b""
    path.unlink()
    if op == "folder":
        path.mkdir()
    elif op == "fifo":
        os.mkfifo(path)
    elif op == "zero":
        path.symlink_to("/dev/zero")
    elif op == "link":  # hubs' caches are full of links: they are followed, and read as any file
        path.symlink_to(folder_of_others(path))
    elif op != "missing":
        path.write_bytes(data)
    return Mutant(f"{path.name}: {op}", keeps_form=op == "flip" and path.suffix == ".safetensors")


def _tensors(path: Path, rng: random.Random, poison: Poison) -> Mutant:
    """A safetensors file: its header or its values."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    start, end = header[name]["data_offsets"]
    op = rng.choice(_TENSORS)
    numbers = str(header[name]["dtype"]).startswith(("F", "BF"))
    # An F32 read as I32 has its size: to a loader that casts, other values.
    values = op in ("scale", "swap", "zero", "dtype") or (op in ("nan", "inf") and not numbers)
    if op in ("nan", "inf"):
        at = start + 4 * rng.randrange(max((end - start) // 4, 1))
        body[at : at + 4] = struct.pack("<f", float(op))
    elif op == "scale":
        body[start + 3] ^= 1
    elif op == "swap":
        body[start:end] = body[start + 4 : end] + body[start : start + 4]
    elif op == "zero":
        body[start:end] = bytes(end - start)
    elif op == "drop":
        del header[name]
    elif op == "rename":
        header[_nudged(name, rng)] = header.pop(name)
    elif op == "dtype":
        header[name]["dtype"] = rng.choice(("F64", "F16", "I32", "BOOL", "X9", 3))
    elif op == "shape":
        header[name]["shape"] = rng.choice(
            (header[name]["shape"][::-1], [10**12, 2], [-1], [], None, [0], "x")
        )
    elif op == "offsets":
        header[name]["data_offsets"] = rng.choice(([0, 10**12], [end, start], [0], None, [0, 4]))
    elif op == "header":
        header, _ = _change(header, rng, poison, is_config=False)
    elif op == "extra":
        header["fuzz"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
        body += bytes(4)
    text = json.dumps(header).encode()
    length = len(text) if op != "length" else rng.choice((0, 2**40, len(text) - 3, 2**63))
    path.write_bytes(struct.pack("<Q", length) + text + bytes(body))
    return Mutant(f"{path.name}: {op} {name}", keeps_form=values)


def folder_of_others(path: Path) -> Path:
    """A file of another artefact, of another kind."""
    return path.parents[2] / "whole" / "allocation" / "allocation.json"


def remove(folder: Path) -> None:
    """A mutant's folder, whatever it holds now."""
    shutil.rmtree(folder, ignore_errors=True)
