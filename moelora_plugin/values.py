"""What may stand in a configuration: plain values, of bounded size, of the type they are hinted as.

A configuration is saved as JSON and may come from a stranger, so nothing else can be in one, and
nothing is built before its size is known. Standard library only.
"""

from __future__ import annotations

import math
import reprlib
import types
from collections.abc import Mapping, Sequence, Set
from enum import Enum
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from .errors import ConfigError

# Far above what any method uses, and far below what a machine cannot hold. Numbers that are counts
# of something large have a bound of their own beside these.
MAX_NUMBER = 2**31  # of any integer
MAX_DEPTH = 8  # mappings and lists in each other
MAX_ENTRIES = 1_000_000  # all entries of all lists and mappings under one key
MAX_TEXT = 100_000  # characters
MAX_EXPERTS = 4096  # of one module
MAX_RANK = 65_536  # of all experts of one module together
MAX_LAYERS = 4096  # numbers written down from the bottom to the top
MAX_ROUNDS = 1000  # repetitions of a computation in every forward
MAX_ELEMENTS = 2**26  # numbers of one part in a layer of width 64

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 120
_SHOWN.maxlist = _SHOWN.maxtuple = _SHOWN.maxdict = _SHOWN.maxset = 8
_SHOWN.maxlevel = 3


class SavedPaths(list[str]):
    """Paths in a saved configuration: they say where its maker's files lay, and are never opened.

    A list in every other respect, also when it is copied or written.
    """


def shown(value: Any) -> str:
    """A value as a message may show it: short, whatever it is."""
    if isinstance(value, int) and abs(value) > 10**20:  # Python refuses to write a very long one
        return "a very large integer"
    return _SHOWN.repr(value)


def require_plain(key: str, value: Any) -> None:
    """Refuse what JSON cannot hold, what is no number, and what is too much.

    Args:
        key: the key of the configuration that the value stands under.
        value: what stands there.

    Raises:
        ConfigError: naming the key and the bound.
    """
    entries = 0
    level: list[tuple[str, Any]] = [(key, value)]
    for depth in range(MAX_DEPTH + 1):
        below: list[tuple[str, Any]] = []
        for where, item in level:
            if isinstance(item, Mapping):
                _require_keys(where, item)
                entries += len(item)
            elif isinstance(item, list | tuple | Set):
                entries += len(item)
            else:
                _require_leaf(where, item)
                continue
            if depth == MAX_DEPTH:
                raise ConfigError(
                    f"{key} holds lists and mappings more than {MAX_DEPTH} deep; take some out."
                )
            if entries > MAX_ENTRIES:
                raise ConfigError(f"{key} holds more than {MAX_ENTRIES:,} entries; give fewer.")
            if isinstance(item, Mapping):
                below += [(f"{where}[{shown(name)}]", inner) for name, inner in item.items()]
            else:
                below += [(where, inner) for inner in item]
        level = below


def _require_keys(where: str, mapping: Mapping[Any, Any]) -> None:
    for name in mapping:
        if not isinstance(name, str):
            raise ConfigError(f"{where} has the key {shown(name)}, which must be text.")
        _require_leaf(where, name)


def _require_leaf(where: str, item: Any) -> None:
    if isinstance(item, str):
        if len(item) > MAX_TEXT:
            raise ConfigError(f"{where} holds text of more than {MAX_TEXT:,} characters.")
    elif isinstance(item, int):
        if abs(item) > MAX_NUMBER:
            raise ConfigError(
                f"{where}={shown(item)} must not be more than {MAX_NUMBER:,} either way."
            )
    elif isinstance(item, float):
        if not math.isfinite(item):
            raise ConfigError(f"{where}={item!r} must be a finite number.")
    elif item is not None:
        raise ConfigError(
            f"{where}={shown(item)} is a {type(item).__name__}, which cannot be saved; give text, "
            "numbers, true or false, null, lists or mappings."
        )


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type hint; of a hint that says nothing about plain values, True."""
    if hint is Any or isinstance(hint, TypeVar):
        return True
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    kind = origin or hint
    if not isinstance(kind, type):
        return True
    if issubclass(kind, Enum):
        return isinstance(value, kind) or value in [member.value for member in kind]
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping) and _all_fit(value.values(), parts[1:])
    if issubclass(kind, Sequence):
        if isinstance(value, str) or not isinstance(value, list | tuple):
            return False
        return _all_fit(value, parts[:1])
    return isinstance(value, kind)


def _all_fit(values: Any, hints: Sequence[Any]) -> bool:
    return all(fits(value, hint) for hint in hints for value in values)


def in_words(hint: Any) -> str:
    """What a type hint asks for."""
    known = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    if hint in known:
        return known[hint]
    if hint is None or hint is type(None):
        return "null"
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, parts))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(part) for part in parts))
    kind = origin or hint
    if not isinstance(kind, type):
        return "something else"
    if issubclass(kind, Enum):
        return "one of " + ", ".join(repr(member.value) for member in kind)
    if issubclass(kind, Mapping):
        return "a mapping" + (
            f" of names to {in_words(parts[1])}" if parts and parts[1] is not Any else ""
        )
    if issubclass(kind, Sequence):
        return f"a list of {_in_plural(parts[0])}" if parts else "a list"
    return f"a {kind.__name__}"


def _in_plural(hint: Any) -> str:
    words = in_words(hint).removeprefix("an ").removeprefix("a ")
    first, space, rest = words.partition(" ")
    return words if first in ("true", "one") else f"{first}s{space}{rest}"
