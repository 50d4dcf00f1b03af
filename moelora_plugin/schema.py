"""Plain mappings into dataclasses, and every mistake in them into one sentence.

A section of a recipe or of a file of ours is a dataclass; its annotations are the schema. Supported
are the types that YAML and JSON can write: bool, int, float, str, Literal, list, dict, tuple,
`X | None`, `list[...] | dict[...]`, Any and nested dataclasses.
"""

from __future__ import annotations

import dataclasses
import reprlib
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import ConfigError
from .lookup import unknown_name_message

T = TypeVar("T")

# `metadata` of a dataclass's field that is made from others and stands in no file.
NOT_IN_FILES = {"in_files": False}

_EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
}
_LARGEST = 1e100  # of a number; sums and products of those below stay finite

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 100
_short.maxlist = _short.maxtuple = _short.maxdict = 6
_short.maxlevel = 3


@dataclass(frozen=True)
class Source:
    """Where a mapping comes from.

    Attributes:
        is_strict: whether keys that the dataclass does not have are mistakes.
        remedy: what to do about a mistake, with {key} for the key's name.
        missing: what to say of a key that has no default and is not there.
    """

    is_strict: bool = True
    remedy: str = "change {key}"
    missing: str = "The recipe has no {key}; set {key}."


RECIPE = Source()


def written_by(command: str) -> Source:
    """A file that one of our commands has written: more keys are fine, mistakes are damage."""
    remedy = f"run `{command}` again"
    return Source(False, remedy, f"{{key}} is missing; {remedy}.")


def from_mapping(
    cls: type[T], values: Mapping[str, Any], prefix: str = "", source: Source = RECIPE
) -> T:
    """Build the dataclass `cls` from `values`, checking names and types.

    Args:
        cls: a dataclass.
        values: its fields, as read from YAML or JSON.
        prefix: the dotted path of `values`, for messages ("optimizer.").
        source: where they come from.

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type.
    """
    hints = _hints(cls)  # type: ignore[arg-type]
    if source.is_strict:
        for key in values:
            if key not in hints:
                known = [prefix + name for name in hints]
                raise ConfigError(unknown_name_message("recipe key", f"{prefix}{key}", known))
    given = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in values and field.name in hints:
            key = prefix + field.name
            given[field.name] = _convert(values[field.name], hints[field.name], key, source)
        elif {field.default, field.default_factory} == {dataclasses.MISSING}:
            raise ConfigError(source.missing.format(key=prefix + field.name))
    return cls(**given)


def require(
    condition: bool, key: str, value: object, expected: str, source: Source = RECIPE
) -> None:
    """Refuse a value outside its range.

    Raises:
        ConfigError: `condition` is false; the message names the key and what it may hold.
    """
    if not condition:
        remedy = source.remedy.replace("{key}", key)
        raise ConfigError(f"{key} is {_short.repr(value)}, but {expected} is expected; {remedy}.")


@lru_cache
def _hints(cls: Any) -> dict[str, Any]:
    """The types of the fields that files may have."""
    hints = get_type_hints(cls)
    fields = dataclasses.fields(cls)
    return {one.name: hints[one.name] for one in fields if one.metadata.get("in_files", True)}


def _convert(value: Any, hint: Any, key: str, source: Source) -> Any:
    """`value` as the type `hint`, or a ConfigError naming `key`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, key, source)
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise ConfigError(unknown_name_message(key, str(value)[:100], arguments))
        return value
    if dataclasses.is_dataclass(hint):
        require(isinstance(value, Mapping), key, value, "a mapping", source)
        return from_mapping(hint, value, f"{key}.", source)  # type: ignore[arg-type]
    if hint is float and type(value) in (int, float):
        # NaN is in no range either.
        require(-_LARGEST < value < _LARGEST, key, value, "a finite number", source)
        return float(value)
    if origin is tuple:
        require(isinstance(value, (list, tuple)), key, value, "a list", source)
        expected = f"a list of {len(arguments)} values"
        require(len(value) == len(arguments), key, value, expected, source)
        pairs = zip(value, arguments, strict=True)
        return tuple(_convert(item, arm, key, source) for item, arm in pairs)
    # Exact types: a bool is an int to Python, but `max_length: true` is a mistake.
    require(type(value) is (origin or hint), key, value, _EXPECTED[origin or hint], source)
    if origin is list:
        return [_convert(item, arguments[0], key, source) for item in value]
    if origin is dict:
        for name in value:
            require(isinstance(name, str), f"{key}, a key of it,", name, "a text", source)
        return {
            name: _convert(item, arguments[1], f"{key}.{name}", source)
            for name, item in value.items()
        }
    return value


def _convert_union(value: Any, arms: tuple[Any, ...], key: str, source: Source) -> Any:
    """`value` as the arm of the union it has the shape of."""
    if value is None and types.NoneType in arms:
        return None
    shapes = [arm for arm in arms if arm is not types.NoneType]
    if len(shapes) == 1:
        return _convert(value, shapes[0], key, source)
    for arm in shapes:
        if isinstance(value, get_origin(arm) or arm):
            return _convert(value, arm, key, source)
    expected = " or ".join(_EXPECTED[get_origin(arm) or arm] for arm in shapes)
    require(False, key, value, expected, source)
