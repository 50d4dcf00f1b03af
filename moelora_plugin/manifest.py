"""What stands beside an adapter's weights: its configuration and its manifest, read and checked.

The manifest (`moelora.json`) says what tells the adapter's files from changed ones, which entries
are ours and must be right, and how the adapter came about, which is what the caller of
`save_adapter` had to say: `entry` gives of it what stands there in the form that training writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig

from .config import FREE_KEYS
from .errors import AdapterError
from .fingerprints import is_fingerprint, is_finite_number
from .reading import read_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "moelora.json"

_ABSENT = object()


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_tasks(value: object) -> bool:
    """Names, or names with their shares."""
    return isinstance(value, list | dict) and all(isinstance(one, str) for one in value)


def _is_data(value: object) -> bool:
    """What `TrainingData.to_dict` writes, as far as it is read."""
    return isinstance(value, list) and all(
        isinstance(one, dict)
        and _is_text(one.get("task"))
        and _is_text(one.get("split"))
        and type(one.get("rows")) is int
        for one in value
    )


def _is_routing(value: object) -> bool:
    """By layer the loads of the experts and the routers' entropy."""
    return isinstance(value, dict) and all(
        isinstance(layer, dict)
        and isinstance(layer.get("load"), list)
        and layer["load"]
        and all(map(is_finite_number, layer["load"]))
        and is_finite_number(layer.get("entropy"))
        for layer in value.values()
    )


_Check = tuple[Callable[[Any], bool], str]
_OBJECT: _Check = (lambda value: isinstance(value, dict), "an object")
_TEXT: _Check = (_is_text, "a text")
_WHOLE: _Check = (lambda value: type(value) is int, "a whole number")
_NUMBER: _Check = (is_finite_number, "a finite number")

# What `save_adapter` itself writes: what an entry must be where it is there, and how that is said.
_OWN: Mapping[str, _Check] = {
    "weights_sha256": _TEXT,
    "config": _OBJECT,
    "base_fingerprint": (
        lambda value: is_fingerprint(value, "shapes_sha256"),
        "a fingerprint with shapes_sha256 and finite samples",
    ),
    "base_embeddings": (
        lambda value: is_fingerprint(value, "shape"),
        "a fingerprint with shape and finite samples",
    ),
    "base_quantization": _TEXT,
}
# What training writes beside, by path, as far as it is read anywhere.
_HISTORY: Mapping[tuple[str, ...], _Check] = {
    ("recipe",): _OBJECT,
    ("recipe", "seed"): _WHOLE,
    ("recipe", "data"): _OBJECT,
    ("recipe", "data", "tasks"): (_is_tasks, "a list of names"),
    ("recipe", "data", "limit"): _WHOLE,
    ("recipe", "optimizer"): _OBJECT,
    ("recipe", "optimizer", "name"): _TEXT,
    ("recipe", "optimizer", "lr"): _NUMBER,
    ("recipe", "optimizer", "gate_lr"): _NUMBER,
    ("data",): (_is_data, "a list of objects with task, split and rows"),
    ("steps",): _WHOLE,
    ("train_loss",): _NUMBER,
    ("trainable_parameters",): _WHOLE,
    ("routing",): (_is_routing, "an object with load and entropy by layer"),
}


def entry(manifest: Mapping[str, Any], *path: str) -> Any:
    """What stands at a path of `_HISTORY`; None where there is nothing, or something else."""
    value = _at(manifest, path)
    return value if value is not None and _HISTORY[path][0](value) else None


def not_understood(manifest: Mapping[str, Any]) -> list[str]:
    """The entries about the adapter's history that are not as training writes them."""
    return [
        f"{'.'.join(path)} is not {expected}"
        for path, (is_right, expected) in _HISTORY.items()
        if (value := _at(manifest, path)) is not None and not is_right(value)
    ]


def _at(manifest: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = manifest
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration as it stands in the file.

    Raises:
        AdapterError: it is not a JSON object.
    """
    return _read_json(folder / CONFIG_FILE)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, or an empty dict for an adapter that PEFT alone has saved.

    Raises:
        AdapterError: what has its name is no JSON object, or an entry of ours has the wrong type.
    """
    path = folder / MANIFEST_FILE
    if not os.path.lexists(path):
        return {}
    manifest = _read_json(path)
    for key, (is_right, expected) in _OWN.items():
        value = manifest.get(key)
        if value is not None and not is_right(value):
            raise AdapterError(
                f"{path} is damaged: {key} must be {expected}, got {_brief(value)}; "
                "save or download the adapter again."
            )
    return manifest


def deciding_config(folder: Path) -> dict[str, Any]:
    """The part of a configuration that decides what the adapter answers."""
    config = read_adapter_config(folder)
    return {key: value for key, value in config.items() if key not in FREE_KEYS}


def verify_config(folder: Path) -> None:
    """Check that the configuration answers as the one that was saved.

    A key that is missing in one of them stands for its default, since PEFT's next release may write
    more keys; keys that no configuration has are not read by anybody.

    Raises:
        AdapterError: it was changed since.
    """
    saved = read_manifest(folder).get("config")
    if saved is None:  # PEFT alone saved it, or a release of moelora that did not note it
        return
    found = deciding_config(folder)
    defaults = _defaults(found.get("peft_type"))
    for key in sorted(saved.keys() | found.keys()):
        default = defaults.get(key, _ABSENT)
        before, now = (_comparable(side.get(key, default)) for side in (saved, found))
        if before != now and not (key not in saved and default is _ABSENT):
            guard = "checksum" in read_adapter_config(folder)
            also = f" and take 'checksum' out of {CONFIG_FILE}" if guard else ""
            raise AdapterError(
                f"{folder / CONFIG_FILE} was changed after it was saved: {key} is {_brief(now)}, "
                f"{MANIFEST_FILE} says {_brief(before)}; set it back, or, if you mean it, change "
                f"config.{key} in {MANIFEST_FILE} too{also}."
            )


def _defaults(peft_type: Any) -> dict[str, Any]:
    """The defaults of a PEFT type's configuration, as JSON has them."""
    known: Mapping[Any, type[PeftConfig]] = PEFT_TYPE_TO_CONFIG_MAPPING
    kind = known.get(peft_type) if isinstance(peft_type, str) else None
    found: dict[str, Any] = {}
    for field in fields(kind) if kind is not None else ():
        if field.default is not MISSING:
            found[field.name] = field.default
        elif field.default_factory is not MISSING:
            found[field.name] = field.default_factory()
    return found


def _comparable(value: Any) -> Any:
    """PEFT writes sets of names as lists in any order."""
    if isinstance(value, set | list | tuple):
        values = list(value)
        return sorted(values) if all(isinstance(one, str) for one in values) else values
    return value


def _brief(value: Any) -> str:
    """A value for a message: whole where it is short."""
    if value is _ABSENT:
        return "missing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, remedy="save or download it again", error=AdapterError)
