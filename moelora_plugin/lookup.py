"""Look a method up by name: what is built in, then what a program or a package has registered.

Every family of methods (routers, experts, allocations, initializations, presets, tasks) is a plain
dict from name to object; `families` says which there are and how others add to them. A dotted path
(`my_package.my_module.MyRouter`) is imported only where a person gives it (`given`).
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar, get_type_hints

from .errors import ConfigError
from .families import FAMILIES, find, how_to_add, import_part
from .values import fits, in_words, shown

T = TypeVar("T")


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The known names most like `name`, best first."""
    return difflib.get_close_matches(name, list(known), n=limit, cutoff=0.5)


def unknown_name_message(what: str, name: str, known: Iterable[str]) -> str:
    """One sentence for an unknown name: the nearest names, or all of them where none is near."""
    names = sorted(known)
    close = nearest(name, names)
    if close:
        return f"Unknown {what} {name!r}; did you mean {' or '.join(map(repr, close))}?"
    return f"Unknown {what} {name!r}; known are {', '.join(names)}."


def unknown_key_message(where: str, key: str, known: Iterable[str]) -> str:
    """One sentence for an unknown key: the nearest keys, and all of them."""
    keys = sorted(known)
    close = nearest(key, keys)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{where} has no key {key!r}; {hint}valid keys are {', '.join(keys)}."


def lookup(family: str, name: str, table: Mapping[str, T]) -> T:
    """Find the method called `name`; nothing is imported on a name's word.

    Args:
        family: plural family name, also the entry-point group's suffix ("routers").
        name: a key of `table`, or what was registered under it (see `families`).
        table: the built-in methods.

    Raises:
        ConfigError: nothing has that name; the message offers the nearest ones.
    """
    if not isinstance(name, str):
        raise ConfigError(f"The {FAMILIES[family].what} {shown(name)} must be a name.")
    if name in table:
        return table[name]
    found: T | None = find(family, name)
    if found is not None:
        return found
    if "." in name:
        what = FAMILIES[family].what
        raise ConfigError(f"There is no {what} {name!r} here; {how_to_add(family, name)}.")
    raise ConfigError(unknown_name_message(FAMILIES[family].what, name, table))


def given(family: str, name: str, table: Mapping[str, T]) -> T:
    """The same for a name that a person gives, which may be a dotted path: it is imported.

    Raises:
        ConfigError: nothing has that name, it cannot be imported, or it is not of the family.
    """
    if not isinstance(name, str) or "." not in name or name in table:
        return lookup(family, name, table)
    found: T | None = find(family, name)
    imported: T = import_part(family, name) if found is None else found
    return imported


def with_options(key: str, method: Callable[..., T], options: Mapping[str, Any], *args: Any) -> T:
    """Call a method with its part of the configuration.

    Args:
        key: the configuration's key that the options stand under ("router_kwargs").
        method: what `lookup` found.
        options: the value of that key.
        *args: what every method of the family is given.

    Raises:
        ConfigError: an option that the method does not have.
    """
    check_options(key, method, options)
    return method(*args, **options)


def check_options(key: str, method: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """A method's options are its keyword-only parameters; refuse others, and other types.

    Raises:
        ConfigError: an option that the method does not have, one that is missing, or one that is
            not of the type that the method's signature says.
    """
    known = _options(method)
    unknown = sorted(set(options) - set(known))
    if unknown and not known:
        raise ConfigError(f"{key} has no key {unknown[0]!r}: this method has no options.")
    if unknown:
        raise ConfigError(unknown_key_message(key, unknown[0], known))
    for name, value in options.items():
        if not fits(value, known[name].hint):
            raise ConfigError(
                f"{key}[{name!r}]={shown(value)} must be {in_words(known[name].hint)}."
            )
    for name, option in known.items():
        if option.required and name not in options:
            wanted = "" if option.hint is Any else f", {in_words(option.hint)}"
            raise ConfigError(f"{key} needs the key {name!r}{wanted}.")


class Option(NamedTuple):
    """What a method's signature says of one of its options."""

    hint: Any  # `Any` where the type cannot be told
    required: bool


@functools.cache  # every layer asks
def _options(method: Callable[..., Any]) -> dict[str, Option]:
    """A method's options by name."""
    hints = _hints(method)
    return {
        name: Option(hints.get(name, Any), parameter.default is parameter.empty)
        for name, parameter in inspect.signature(method).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def _hints(method: Callable[..., Any]) -> dict[str, Any]:
    """The types of a method's parameters, as far as they can be told."""
    maker = getattr(method, "__init__") if isinstance(method, type) else method  # noqa: B009
    function = inspect.unwrap(maker)
    names = getattr(function, "__globals__", {})
    hints: dict[str, Any] = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        alone = SimpleNamespace(__annotations__={name: annotation})
        try:
            hints |= get_type_hints(alone, globalns=names)
        except Exception:  # a name that is there for a type checker alone
            continue
    return hints
