"""A host's options as a MoeLoraConfig."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from peft import PeftConfig
from torch import nn

from .. import MoeLoraConfig
from ..checkpoint import verify_config, verify_weights
from ..errors import ConfigError
from ..lookup import given, nearest
from ..presets import PRESETS
from ..run_guards import differences
from ..targets import adapts_the_same

DEFAULT_PRESET = "moe_lora"
OUR_NAME = "moelora"

# Numbers that a host leaves as text: YAML 1.1 does so with "1e-3", for want of a point.
_FLOAT = re.compile(r"[-+]?(\d+\.\d*|\.?\d+)([eE][-+]?\d+)?")


def option_types(host_words: Iterable[str]) -> dict[str, Any]:
    """The options that a host has no word for, with their types.

    They come from MoeLoraConfig's fields, so that a new one needs no line in any host's file.

    Args:
        host_words: fields of MoeLoraConfig that the host has keys of its own for.
    """
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    hints = get_type_hints(MoeLoraConfig)
    own = [field.name for field in dataclasses.fields(MoeLoraConfig)]
    left_out = {*inherited, *host_words, "format_version"}
    return {"preset": str, **{name: hints[name] for name in own if name not in left_out}}


def refuse_unknown_keys(
    keys: Iterable[str],
    known: Iterable[str],
    key_of: Callable[[str], str],
    host_words: Mapping[str, str],
) -> None:
    """Refuse, by its own name, a key that begins with our name and that a host would pass over.

    Args:
        keys: what a host's file or command line sets, ours and others.
        known: the keys that begin with our name and are read.
        key_of: how a field of MoeLoraConfig is spelt there, for what to write in the key's place.
        host_words: fields of MoeLoraConfig that the host has keys of its own for -> those keys.

    Raises:
        ConfigError: there is such a key.
    """
    known = set(known)
    spelling = {name: key_of(name) for name in option_types(())} | dict(host_words)
    for key in keys:
        if key in known or not key.lower().startswith(OUR_NAME):
            continue
        field = key.lower().removeprefix(OUR_NAME).strip("_.-").replace("-", "_")
        if field in spelling:
            raise ConfigError(f"{key} is not a key here; write {spelling[field]} in its place.")
        close = [spelling[name] for name in nearest(field, spelling)]
        raise ConfigError(
            f"{key} is not a key here; "
            + (f"did you mean {' or '.join(close)}? " if close else "")
            + f"Keys are {', '.join(sorted(spelling.values()))}."
        )


def takes_mapping(hint: Any) -> bool:
    """Whether an option of this type may be a mapping."""
    return any(part is dict or get_origin(part) is dict for part in (hint, *get_args(hint)))


def option_value(name: str, value: Any, key: str = "") -> Any:
    """An option as MoeLoraConfig takes it, whichever way a host has read it.

    A mapping may be JSON, as on a command line, and may hold a host's own kind of mapping or
    numbers that its YAML took for text.

    Args:
        name: a field of MoeLoraConfig.
        value: what the host has read.
        key: the host's name for it, for the error.

    Raises:
        ConfigError: text that is not JSON where only a mapping will do.
    """
    hint = get_type_hints(MoeLoraConfig).get(name)
    if isinstance(value, str) and get_origin(hint) is dict:
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{key or name}={value!r} must be a mapping; on a command line that is JSON, like "
                """'{"name": 0.5}'."""
            ) from error
    return _plain(value) if takes_mapping(hint) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str) and not value.isdigit() and _FLOAT.fullmatch(value):
        return float(value)
    return value


def adapter_config(
    options: Mapping[str, Any], host_words: Mapping[str, Any] | None = None
) -> MoeLoraConfig:
    """The adapter that a host's config file asks for.

    The preset comes first, then what the file says in the host's own words, then our options.

    Args:
        options: fields of MoeLoraConfig, and `preset`. None means not set.
        host_words: fields of MoeLoraConfig that the host has keys of its own for (rank, alpha,
            dropout, target modules). None means not set.

    Raises:
        ConfigError: an unknown key or preset, or a value out of range.
    """
    ours = {k: option_value(k, v) for k, v in options.items() if v is not None}
    given = {**(host_words or {}), **ours}
    fields = {"task_type": "CAUSAL_LM", **{k: v for k, v in given.items() if v is not None}}
    return MoeLoraConfig.from_preset(fields.pop("preset", DEFAULT_PRESET), **fields)


def preset_fields(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of MoeLoraConfig that the options' preset sets.

    Raises:
        ConfigError: an unknown preset.
    """
    return given("presets", options.get("preset") or DEFAULT_PRESET, PRESETS).overrides


def refuse_disagreement(
    options: Mapping[str, Any],
    host_words: Mapping[str, Any],
    saved: Mapping[str, Any],
    folder: str | Path,
    key_of: Callable[[str], str],
    model: nn.Module | None = None,
) -> None:
    """A saved adapter keeps its configuration: what a run states must agree with it.

    Args:
        options: as in `adapter_config`.
        host_words: as in `adapter_config`.
        saved: the adapter's configuration.
        folder: where it lies, for the error.
        key_of: the host's key for a field of MoeLoraConfig, for the error.
        model: the base, which alone tells what target modules find; without it they are left for
            another call.

    Raises:
        ConfigError: a field that the run sets, or that a preset it names sets, has another value.
    """
    asked = adapter_config(options, host_words)
    given = {key for key, value in {**host_words, **options}.items() if value is not None}
    stated = given | set(preset_fields(options) if options.get("preset") else ())
    for field, wanted, found in differences(asked, saved, sorted(stated - {"preset"})):
        if field == "gate_rescale" and wanted == "auto":
            continue
        if field == "target_modules" and (model is None or adapts_the_same(model, saved, wanted)):
            continue
        raise ConfigError(
            f"{key_of(field)} is {wanted!r}, but the adapter in {folder} was trained with "
            f"{found!r} and keeps it; remove the key, or the preset that implies it."
        )


def verify_adapter(folder: Path) -> None:
    """Check that a saved adapter is as it was saved: programs load it by PEFT, which does not.

    Raises:
        AdapterError: its configuration or its weights were changed since.
    """
    verify_config(folder)
    verify_weights(folder)
