"""Recipe files as plain mappings: YAML 1.2 scalars, `extends` and `key=value` overrides."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, first_line
from ..reading import DEPTH, Unreadable, read_text

_RECIPE_BYTES = 2**20  # of a file that people write
_BRACKETS = {"[": 1, "{": 1, "]": -1, "}": -1}
_MOST_VALUES = 100_000  # of a file, every alias written out

_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core scalars: `1e-4` is a number and `no` is a word (`eval_strategy: no`).

    PyYAML implements YAML 1.1, where the one is a text and the other is false.
    """


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def read_recipe_file(path: Path, readers: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a recipe file and the files it extends.

    Args:
        path: the file.
        readers: the files whose `extends` led here, to notice a circle.

    Raises:
        ConfigError: a file is missing, is not a YAML mapping, or extends itself.
    """
    if any(os.path.realpath(path) == os.path.realpath(reader) for reader in readers):
        raise ConfigError(f"{path} extends itself through {readers[-1]}; change extends.")
    reader = f" that {readers[-1]} extends" if readers else ""
    try:
        text = read_text(path, _RECIPE_BYTES)
    except Unreadable as reason:
        raise ConfigError(f"The recipe {path}{reader} {reason}.") from reason
    try:
        values = _parse(text)
    except Unreadable as reason:
        raise ConfigError(f"The recipe {path}{reader} is not valid YAML: {reason}.") from reason
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, but a mapping is expected.")
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"extends is {base!r} in {path}, but a path is expected; change extends.")
    return _merge(read_recipe_file(path.parent / base, (*readers, path)), values)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `key=value` in `values`.

    Raises:
        ConfigError: there is no `=`, the value is not YAML, or the key leads through a plain value.
    """
    key, equals, text = override.partition("=")
    if not key or not equals:
        raise ConfigError(f"The override {override!r} is not key=value, as in optimizer.lr=1e-4.")
    try:
        value = _parse(text)
    except Unreadable as reason:
        raise ConfigError(
            f"The value of the override {override!r} is no YAML; quote it."
        ) from reason
    *parents, last = key.split(".")
    if len(parents) >= DEPTH:
        raise ConfigError(f"The key {key[:40]}... has {len(parents) + 1:,} parts; remove some.")
    for parent in parents:
        values = section(values, parent)
    values[last] = value


def section(values: dict[str, Any], key: str) -> dict[str, Any]:
    """The mapping under `key`, made where there is none.

    Raises:
        ConfigError: there is something under `key` that is not a mapping.
    """
    if values.get(key) is None:
        values[key] = {}
    found = values[key]
    if not isinstance(found, dict):
        raise ConfigError(f"{key} is {found!r}, but a mapping is expected; change {key}.")
    return found


def _parse(text: str) -> Any:
    """YAML's value.

    Raises:
        Unreadable: it is not YAML, or its aliases stand for more than a recipe can hold.
    """
    steps = (_BRACKETS.get(char, 0) for char in text)
    if max(itertools.accumulate(steps), default=0) > 10 * DEPTH:  # PyYAML would take seconds
        raise Unreadable("it is nested too deeply")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_bombs(node)
        return loader.construct_document(node)
    except RecursionError:
        raise Unreadable("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise Unreadable(" ".join(str(error).split())) from error
    except (ValueError, OverflowError) as error:  # a number or a date that Python cannot hold
        raise Unreadable(first_line(error)) from error


def _refuse_bombs(root: yaml.Node) -> None:
    """Refuse what grows when its aliases are written out, before anything writes them out."""
    sizes: dict[int, int] = {}  # of what is done; 0 while a node is being counted

    def count(node: yaml.Node, depth: int) -> int:
        if id(node) in sizes:
            if not sizes[id(node)]:
                raise Unreadable("an alias stands inside of what it stands for")
            return sizes[id(node)]
        if depth > DEPTH:
            raise Unreadable("it is nested too deeply")
        sizes[id(node)] = 0
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        children = (child for part in parts for child in (part if type(part) is tuple else [part]))
        size = 1 + sum(count(child, depth + 1) for child in children)
        if size > _MOST_VALUES:
            raise Unreadable(f"with its aliases written out it has over {_MOST_VALUES:,} values")
        sizes[id(node)] = size
        return size

    count(root, 0)


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `top` over it: sections key by key, every other value as a whole.

    Values inside a section are replaced, not merged: a recipe that names its own `data.tasks` must
    not train on its base's tasks too.
    """
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = {**below, **value} if both else value  # type: ignore[dict-item]
    return merged
