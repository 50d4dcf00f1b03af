"""The fields of a configuration, checked one by one: types, ranges, patterns, files."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Set
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, get_args, get_type_hints

from peft.utils.peft_types import TaskType

from .errors import ConfigError
from .patterns import require_cheap, require_pattern, whole_name
from .reading import Unreadable, parse_json, read_bytes
from .types import GateRescale, GateRescaleScope
from .values import MAX_EXPERTS, MAX_RANK, fits, in_words, require_plain, shown

if TYPE_CHECKING:
    from .config import MoeLoraConfig

_CHOICES = {
    "bias": ("none", "all", "moelora_only"),
    "gate_rescale": ("auto", *get_args(GateRescale)),
    "gate_rescale_scope": get_args(GateRescaleScope),
    "universal_expert": ("none", "one", "complement"),
}
_MAPPINGS = (
    "site_kwargs",
    "router_kwargs",
    "router_score_kwargs",
    "router_input_kwargs",
    "router_modifiers",
    "expert_kwargs",
    "allocation_kwargs",
    "init_kwargs",
)
_COUNTS = {"r": MAX_RANK, "num_experts": MAX_EXPERTS, "top_k": MAX_EXPERTS}
# Names may come in any of Python's collections; saved they are a list.
_LISTS = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "trainable_token_indices",
)


def check_fields(config: MoeLoraConfig) -> None:
    """What can be said of each field alone; collections of names become lists.

    Raises:
        ConfigError: naming the key.
    """
    _check_numbers(config)
    for key, choices in _CHOICES.items():
        _check_choice(config, key, choices)
    _check_aux_losses(config)
    _check_types(config)


def check_patterns(config: MoeLoraConfig) -> None:
    """Regular expressions: that they are such; in a saved configuration also that they are quick.

    After `check_parts`, which says that the parts' options are of their types.

    Raises:
        ConfigError: naming the key.
    """
    require = require_cheap if config.is_saved else require_pattern
    for key, pattern, matched in _patterns(config):
        require(key, pattern, matched)


def _check_numbers(config: MoeLoraConfig) -> None:
    for key, most in _COUNTS.items():
        value = getattr(config, key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{key}={shown(value)} must be an integer of at least 1.")
        if value > most:
            raise ConfigError(f"{key}={shown(value)} must not be more than {most:,}.")
    if config.top_k > config.num_experts:
        raise ConfigError(
            f"top_k={config.top_k} is more than num_experts={config.num_experts}; lower top_k or "
            "raise num_experts."
        )
    if not (_is_number(config.lora_dropout) and 0 <= config.lora_dropout < 1):
        raise ConfigError(f"lora_dropout={shown(config.lora_dropout)} must be a number in [0, 1).")
    if not (_is_number(config.lora_alpha) and 0 < config.lora_alpha < math.inf):
        raise ConfigError(f"lora_alpha={shown(config.lora_alpha)} must be a positive number.")


def check_mappings(config: MoeLoraConfig) -> None:
    """Options are mappings, which all else takes for granted.

    Raises:
        ConfigError: naming the key.
    """
    for key in _MAPPINGS:
        value = getattr(config, key)
        if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
            raise ConfigError(f"{key}={shown(value)} must map names to values.")


def _check_types(config: MoeLoraConfig) -> None:
    """Every field: plain, bounded, and of its type."""
    for key in _LISTS:
        value = getattr(config, key)
        if isinstance(value, Set | tuple | range):
            setattr(config, key, list(value))
    kind: Any = type(config)
    for key, hint in _hints(kind).items():
        value = getattr(config, key)
        if key == "peft_type" or isinstance(value, TaskType):
            continue
        require_plain(key, value)
        if not fits(value, hint):
            raise ConfigError(f"{key}={shown(value)} must be {in_words(hint)}.")
    if config.task_type is not None and config.task_type not in list(TaskType):
        known = ", ".join(repr(task.value) for task in TaskType)
        raise ConfigError(f"task_type={shown(config.task_type)} must be one of {known}.")
    if config.is_saved and not _is_from_transformers(config.auto_mapping):
        # AutoPeftModel would import the module that it names.
        config.auto_mapping = None


def _check_aux_losses(config: MoeLoraConfig) -> None:
    if not isinstance(config.aux_losses, dict):
        raise ConfigError(
            f"aux_losses={shown(config.aux_losses)} must map names to coefficients, like "
            "{'switch_lb': 0.001}."
        )
    for name, value in config.aux_losses.items():
        coefficient = value.get("coefficient") if isinstance(value, dict) else value
        if not (_is_number(coefficient) and 0 <= coefficient < math.inf):
            raise ConfigError(
                f"aux_losses[{name!r}]={shown(value)} must be a number of at least 0, or a "
                "mapping with such a number as coefficient."
            )


def _check_choice(config: MoeLoraConfig, key: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, key)
    if value not in choices:
        raise ConfigError(f"{key}={shown(value)} must be one of {', '.join(map(repr, choices))}.")


def _patterns(config: MoeLoraConfig) -> Iterator[tuple[str, str, str]]:
    """The key that holds a regular expression, the expression, and what is made of it."""
    for key in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, key), str):
            yield key, getattr(config, key), getattr(config, key)
    names = config.layers_pattern or []
    for name in [names] if isinstance(names, str) else names:
        yield "layers_pattern", name, rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\."
    for name in config.modules_to_save or []:
        yield "modules_to_save", name, rf"(^|.*\.){name}($|\..*)"
    if config.allocation == "pattern":
        for axis, mapping in config.allocation_kwargs.items():
            for expression in mapping or ():
                yield f"allocation_kwargs[{axis!r}]", expression, whole_name(expression)
    if config.site in ("linear", "layer", "block"):
        for option, value in config.site_kwargs.items():
            for expression in _texts(value):
                yield f"site_kwargs[{option!r}]", expression, expression


@functools.cache
def _hints(config: Any) -> dict[str, Any]:
    """The type of each field."""
    hints = get_type_hints(config)
    return {f.name: hints[f.name] for f in fields(config)}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _is_from_transformers(mapping: Any) -> bool:
    """Whether an auto_mapping names a class of transformers: no other library is imported."""
    if not isinstance(mapping, dict) or set(mapping) != {"base_model_class", "parent_library"}:
        return False
    names = [str(mapping["base_model_class"]), *str(mapping["parent_library"]).split(".")]
    return names[1] == "transformers" and all(name.isidentifier() for name in names)


def read_allocation(path: Any) -> Any:
    """The content of an allocation's file, which a person has named.

    Raises:
        ConfigError: it cannot be read.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"allocation_kwargs['path']={shown(path)} must be the path of a file.")
    try:
        content = parse_json(read_bytes(Path(path)))
    except Unreadable as reason:
        raise ConfigError(
            f"allocation_kwargs['path']={shown(str(path))} {reason}; name a JSON file of modules."
        ) from reason
    return content


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
