"""Numbers written down for every module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..lookup import unknown_key_message
from ..types import LayerPlan, Place
from ..values import shown
from .base import plan_from

if TYPE_CHECKING:
    from ..config import MoeLoraConfig

_KEYS = ("num_experts", "top_k", "ranks", "alpha")


def modules(
    config: MoeLoraConfig, place: Place, *, modules: Mapping[str, Mapping[str, Any]] | None = None
) -> LayerPlan:
    """An explicit entry per module, such as `moelora search guilomo` writes.

    `allocation_kwargs={"path": "alloc.json"}` reads the mapping from a file, once, when the
    configuration is made: a saved adapter holds its content.

    Args:
        config: gives the numbers that an entry leaves out.
        place: the module.
        modules: entries by module name. An entry may hold "num_experts", "top_k", "ranks" (a list,
            one per expert, or one for all) and "alpha"; without "num_experts" a list of ranks says
            how many there are. A name matches where one of the two ends with the other, so that
            prefixes of wrappers do not matter; the longest match wins.

    Raises:
        ConfigError: the module has no entry, or an entry has an unknown key or a wrong value.
    """
    modules = _required(modules)
    names = [name for name in modules if _is_suffix(name, place.name)]
    if not names:
        raise ConfigError(
            f"allocation_kwargs['modules'] has no entry for {place.name}; add one, or remove the "
            "module from target_modules."
        )
    name = max(names, key=len)
    return _plan_of(config, name, modules[name])


def check_modules(config: MoeLoraConfig) -> list[LayerPlan]:
    """Without a base: the plans of all entries.

    Raises:
        ConfigError: an entry is none.
    """
    entries = _required(config.allocation_kwargs.get("modules"))
    return list(dict.fromkeys(_plan_of(config, name, entry) for name, entry in entries.items()))


def _required(modules: object) -> Mapping[str, Any]:
    if not isinstance(modules, Mapping) or not modules:
        raise ConfigError(
            "allocation='modules' needs allocation_kwargs={'modules': {name: {...}}} or "
            "{'path': 'alloc.json'}."
        )
    return modules


def _plan_of(config: MoeLoraConfig, name: str, entry: Any) -> LayerPlan:
    """The plan of the module that has an entry."""
    where = f"allocation_kwargs['modules'][{name!r}]"
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}={shown(entry)} must map {', '.join(_KEYS)} to values.")
    unknown = sorted(set(entry) - set(_KEYS))
    if unknown:
        raise ConfigError(unknown_key_message(where, unknown[0], _KEYS))
    values = {"r" if key == "ranks" else key: value for key, value in entry.items()}
    if "num_experts" not in values and isinstance(values.get("r"), list | tuple):
        values["num_experts"] = len(values["r"])
    return plan_from(config, where, values, ranks="ranks")


def _is_suffix(first: str, second: str) -> bool:
    """Whether one of two dotted names ends with the other."""
    short, long = sorted((f".{first}", f".{second}"), key=len)
    return long.endswith(short)
