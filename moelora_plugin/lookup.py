"""Look a method up by name: a plain dict first, then entry points, then a dotted path.

Every family of methods (routers, experts, allocations, initializations, presets, tasks) is a plain
dict from name to object. Third parties register theirs in the entry-point group `moelora.<family>`
or name it by dotted path (`my_package.my_module.MyRouter`).
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

from .errors import ConfigError

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
    """Find the method called `name`.

    Args:
        family: plural family name, also the entry-point group's suffix ("routers").
        name: a key of `table`, an entry point of `moelora.<family>`, or a dotted path.
        table: the built-in methods.

    Raises:
        ConfigError: nothing has that name; the message offers the nearest ones.
    """
    if name in table:
        return table[name]
    for entry_point in entry_points(group=f"moelora.{family}"):
        if entry_point.name == name:
            loaded: T = entry_point.load()
            return loaded
    if "." in name:
        module_name, _, attribute = name.rpartition(".")
        try:
            found: T = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"Cannot import {_singular(family)} {name!r}: {error}.") from error
        return found
    raise ConfigError(unknown_name_message(_singular(family), name, table))


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
    """A method's options are its keyword-only parameters; refuse others.

    Raises:
        ConfigError: an option that the method does not have.
    """
    parameters = inspect.signature(method).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(known))
    if unknown and not known:
        raise ConfigError(f"{key} has no key {unknown[0]!r}: this method has no options.")
    if unknown:
        raise ConfigError(unknown_key_message(key, unknown[0], known))


def _singular(family: str) -> str:
    return "loss" if family == "losses" else family.removesuffix("s")
