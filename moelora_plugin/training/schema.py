"""Plain mappings into dataclasses, and every mistake in them into one sentence.

A section of a recipe is a dataclass; its annotations are the schema. Supported are the types YAML
can write: bool, int, float, str, Literal, list, dict, tuple, `X | None`, `list[...] | dict[...]`,
Any and nested dataclasses.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import ConfigError
from ..lookup import unknown_name_message

T = TypeVar("T")

_EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
}


def from_mapping(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Build the dataclass `cls` from `values`, checking names and types.

    Args:
        cls: a dataclass.
        values: its fields, as read from YAML.
        prefix: the dotted path of `values`, for messages ("optimizer.").

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type.
    """
    hints = get_type_hints(cls)
    for key in values:
        if key not in hints:
            known = [prefix + name for name in hints]
            raise ConfigError(unknown_name_message("recipe key", f"{prefix}{key}", known))
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        has_default = {field.default, field.default_factory} != {dataclasses.MISSING}
        if not has_default and field.name not in values:
            raise ConfigError(f"The recipe has no {prefix}{field.name}; set {prefix}{field.name}.")
    return cls(**{key: _convert(value, hints[key], prefix + key) for key, value in values.items()})


def require(condition: bool, key: str, value: object, expected: str) -> None:
    """Refuse a value outside its range.

    Raises:
        ConfigError: `condition` is false; the message names the key and what it may hold.
    """
    if not condition:
        raise ConfigError(f"{key} is {value!r}, but {expected} is expected; change {key}.")


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type `hint`, or a ConfigError naming `key`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, key)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(unknown_name_message(key, str(value), arguments))
        return value
    if dataclasses.is_dataclass(hint):
        require(isinstance(value, Mapping), key, value, "a mapping")
        return from_mapping(hint, value, f"{key}.")  # type: ignore[arg-type]
    if hint is float and type(value) is int:
        return float(value)
    if origin is tuple:
        require(isinstance(value, (list, tuple)), key, value, "a list")
        require(len(value) == len(arguments), key, value, f"a list of {len(arguments)} values")
        return tuple(_convert(item, arm, key) for item, arm in zip(value, arguments, strict=True))
    # Exact types: a bool is an int to Python, but `max_length: true` is a mistake.
    require(type(value) is (origin or hint), key, value, _EXPECTED[origin or hint])
    if origin is list:
        return [_convert(item, arguments[0], key) for item in value]
    if origin is dict:
        return {name: _convert(item, arguments[1], f"{key}.{name}") for name, item in value.items()}
    return value


def _convert_union(value: Any, arms: tuple[Any, ...], key: str) -> Any:
    """`value` as the arm of the union it has the shape of."""
    if value is None and types.NoneType in arms:
        return None
    shapes = [arm for arm in arms if arm is not types.NoneType]
    if len(shapes) == 1:
        return _convert(value, shapes[0], key)
    for arm in shapes:
        if isinstance(value, get_origin(arm) or arm):
            return _convert(value, arm, key)
    expected = " or ".join(_EXPECTED[get_origin(arm) or arm] for arm in shapes)
    raise ConfigError(f"{key} is {value!r}, but {expected} is expected; change {key}.")
