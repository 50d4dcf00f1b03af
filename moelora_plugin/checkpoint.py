"""Adapters on disk: PEFT's two files plus a manifest, written whole or not at all.

adapter_config.json        PEFT's
adapter_model.safetensors  PEFT's
moelora.json               manifest: sha256 of the weights, what tells the base from others,
                           how the adapter was trained
tokenizer files            or a vision model's processor, where one was given
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from . import __version__
from .base_model import HUB_ERRORS, load_base_model
from .errors import (
    AdapterError,
    ConfigError,
    ExportError,
    MissingDependencyError,
    first_line,
)
from .files import atomic_directory, sha256_of, write_json
from .model import moelora_layers
from .processors import holds_processor, load_processor
from .reading import read_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "moelora.json"

# A base is recognised by a few of its weights. bf16, fp16 and fp32 copies differ by at most 2^-8 of
# a value; 2 % leaves room for that and still tells two models apart at the first value.
_SAMPLES = 16
_RELATIVE_TOLERANCE = 0.02
_ABSOLUTE_TOLERANCE = 1e-6  # fp16 flushes values below this to multiples of 6e-8


def save_adapter(
    model: PeftModel,
    out: Path | str,
    *,
    tokenizer: Any = None,
    manifest: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Save the active adapter into the folder `out`: all of it, or nothing.

    Args:
        model: what `peft.get_peft_model` returned, with one active adapter.
        out: the folder to make.
        tokenizer: or processor; saved beside the adapter, so that it loads with the prompts it was
            trained on.
        manifest: how the adapter came about (recipe, data, scores, ...); JSON values.
        overwrite: replace a folder that already holds something.

    Raises:
        ConfigError: `out` holds something and `overwrite` is False.
    """
    adapter = model.active_adapters[0]
    with atomic_directory(out, overwrite=overwrite) as folder:
        model.save_pretrained(str(folder), selected_adapters=[adapter])
        # PEFT puts an adapter that is not called "default" into a folder of its name.
        nested = folder / adapter
        if adapter != "default" and nested.is_dir():
            for file in nested.iterdir():
                file.rename(folder / file.name)
            nested.rmdir()
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        write_json(
            folder / MANIFEST_FILE,
            {
                **(manifest or {}),
                "moelora_version": __version__,
                "weights_sha256": sha256_of(folder / WEIGHTS_FILE),
                "base_fingerprint": base_fingerprint(model),
            },
        )
    return Path(out)


def load_adapter(
    path: Path | str,
    *,
    base: str | PreTrainedModel | None = None,
    dtype: str = "auto",
    device: str | None = None,
    allow_base_mismatch: bool = False,
    fold: bool = False,
) -> tuple[PeftModel, Any]:
    """Load an adapter on its base, ready for inference, or say what is wrong with it.

    Stricter than `PeftModel.from_pretrained`, which only warns where tensors are missing: the
    weights must match the manifest's digest, every tensor must find its place, and the base must be
    the one the adapter was trained on.

    Args:
        path: folder or hub id of an adapter (of any PEFT type).
        base: folder or hub id of the base, or the base itself, which the adapter is put on; the
            adapter's own where left out.
        dtype: "auto" (the checkpoint's on an accelerator, float32 on a CPU) or a torch dtype's
            name.
        device: "cpu", "cuda", ...; the accelerator where there is one.
        allow_base_mismatch: load on another base all the same.
        fold: merge an adapter whose gates ignore the input into the base's weights, so that a token
            costs what it costs the base; one whose gates follow the input stays beside them. The
            model's `unmerge_adapter` takes it out again, up to rounding in the base's dtype.

    Returns:
        The model in eval mode and its tokenizer or, of a vision model, its processor: the adapter's
        own where it has one, else the base's.

    Raises:
        AdapterError: damaged files, missing tensors, or another base.
        ConfigError: neither the adapter nor the base has a tokenizer or processor.
        MissingDependencyError: adapter or base is not a folder and the hub cannot be reached.
    """
    given = base.name_or_path if isinstance(base, PreTrainedModel) else base
    folder, name = check_adapter(path, given, allow_base_mismatch=allow_base_mismatch)
    adapter = read_adapter_config(folder)
    revision = adapter.get("revision") if name == adapter.get("base_model_name_or_path") else None
    if isinstance(base, PreTrainedModel):
        base_model = base
    else:
        base_model = load_base_model(name, revision=revision, dtype=dtype, device=device)
    try:
        with warnings.catch_warnings():
            # PEFT only warns of missing tensors; below they are an error, which says more.
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            # The file's tensors become the parameters, with neither an initialisation nor a copy
            # before. On a half precision base PEFT would round them to its dtype.
            is_wide = base_model.dtype in (torch.float32, torch.float64)
            model = PeftModel.from_pretrained(base_model, str(folder), low_cpu_mem_usage=is_wide)
    except (RuntimeError, ValueError) as error:
        raise AdapterError(
            f"The adapter in {folder} does not fit the base {name!r}: {first_line(error)}; pass "
            "the base it was trained on (--base)."
        ) from error
    _refuse_missing_tensors(folder, model)
    if not allow_base_mismatch:
        _refuse_other_weights(model, read_manifest(folder).get("base_fingerprint"), name)
    if fold:
        with contextlib.suppress(ExportError):  # which comes before anything is touched
            model.merge_adapter()
    if holds_processor(folder, base_model.config):
        return model.eval(), load_processor(str(folder), base_model.config)
    return model.eval(), load_processor(name, base_model.config, revision=revision)


def check_adapter(
    path: Path | str, base: str | None = None, *, allow_base_mismatch: bool = False
) -> tuple[Path, str]:
    """What can be told of an adapter before its base is loaded.

    Args:
        path: folder or hub id of an adapter.
        base: folder or hub id of the base it is to be put on; the adapter's own where left out.
        allow_base_mismatch: accept another hub id than the adapter's own.

    Returns:
        Its local folder, and the folder or hub id of its base.

    Raises:
        AdapterError: damaged files, or another base.
        ConfigError: no base is known.
        MissingDependencyError: not a folder, and the hub cannot be reached.
    """
    folder = resolve_adapter(path)
    recorded = read_adapter_config(folder).get("base_model_name_or_path")
    verify_weights(folder)
    name = base or recorded
    if not name:
        raise ConfigError(f"{CONFIG_FILE} in {folder} names no base model; pass base (--base).")
    if not allow_base_mismatch:
        _refuse_other_name(name, recorded)
    return folder, name


def resolve_adapter(path: Path | str) -> Path:
    """The adapter's local folder; a hub id is downloaded.

    Raises:
        AdapterError: the folder holds no adapter.
        MissingDependencyError: not a folder, and the hub cannot be reached or does not know it.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(path)))
        except HUB_ERRORS as error:
            raise MissingDependencyError(
                f"Adapter {str(path)!r} is not a folder and cannot be had from the hub "
                f"({first_line(error)}); pass the path of a folder with {CONFIG_FILE}."
            ) from error
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise AdapterError(f"{folder} holds no {name}; pass the folder of a saved adapter.")
    return folder


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration as it stands in the file."""
    return _read_json(folder / CONFIG_FILE)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, or an empty dict for an adapter that PEFT alone has saved."""
    path = folder / MANIFEST_FILE
    return _read_json(path) if path.is_file() else {}


def verify_weights(folder: Path) -> str:
    """Check that the weights can be read and are the ones the manifest was written for.

    Returns:
        Their sha256.

    Raises:
        AdapterError: truncated, not safetensors, or changed since they were saved.
    """
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except SafetensorError as error:
        raise AdapterError(
            f"{path} is truncated or damaged ({first_line(error)}); save or download it again."
        ) from error
    digest = sha256_of(path)
    expected = read_manifest(folder).get("weights_sha256")
    if expected is not None and digest != expected:
        raise AdapterError(
            f"{path} was changed after it was saved: its sha256 is {digest[:12]}..., "
            f"{MANIFEST_FILE} says {str(expected)[:12]}...; save or download it again."
        )
    return digest


def base_fingerprint(model: nn.Module) -> dict[str, Any] | None:
    """What tells the base from others: shapes of the adapted modules and a few of their weights.

    None where the base weights are not plain floating-point tensors (quantised or not
    materialised).
    """
    layers = moelora_layers(model)
    weights: list[torch.Tensor] = []
    for layer in layers.values():
        weight = getattr(layer.get_base_layer(), "weight", None)
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.is_meta:
            return None
        weights.append(weight)
    if not weights:
        return None
    # Names differ with the wrapping (PeftModel or bare); the order of modules does not.
    shapes = json.dumps([list(w.shape) for w in weights])
    samples = []
    for k in range(_SAMPLES):
        flat = weights[k * len(weights) // _SAMPLES].detach().flatten()
        samples.append(float(flat[(2 * k + 1) * flat.numel() // (2 * _SAMPLES)]))
    return {
        "modules": len(weights),
        "shapes_sha256": hashlib.sha256(shapes.encode()).hexdigest(),
        "samples": samples,
    }


def _refuse_other_name(base: str, recorded: str | None) -> None:
    """Two hub ids that differ are two models. Folders move, so their names say nothing."""
    if recorded and base != recorded and not os.path.isdir(base) and not os.path.isdir(recorded):
        raise AdapterError(
            f"The adapter was trained on {recorded!r}, not on {base!r}; drop --base, or pass "
            "--allow-base-mismatch if you mean it."
        )


def _refuse_other_weights(model: nn.Module, expected: Mapping[str, Any] | None, base: str) -> None:
    found = base_fingerprint(model)
    if expected is None or found is None:
        return
    same = found["shapes_sha256"] == expected["shapes_sha256"] and all(
        abs(a - b) <= _RELATIVE_TOLERANCE * max(abs(a), abs(b)) + _ABSOLUTE_TOLERANCE
        for a, b in zip(found["samples"], expected["samples"], strict=True)
    )
    if not same:
        raise AdapterError(
            f"The weights of {base!r} are not those of the base this adapter was trained on; pass "
            "that base (--base), or --allow-base-mismatch if you mean it."
        )


def _refuse_missing_tensors(folder: Path, model: PeftModel) -> None:
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        stored = set(file.keys())
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    missing, unknown = sorted(wanted - stored), sorted(stored - wanted)
    if missing:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE} lacks {len(missing)} of {len(wanted)} tensors, the first "
            f"being {missing[0]}; save or download it again."
        )
    if unknown:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE} holds {len(unknown)} tensors that have no place in the base, "
            f"the first being {unknown[0]}; pass the base it was trained on (--base)."
        )


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, remedy="save or download it again", error=AdapterError)
