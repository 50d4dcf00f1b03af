"""Adapters on disk: PEFT's two files plus a manifest, written whole or not at all.

adapter_config.json        PEFT's
adapter_model.safetensors  PEFT's
moelora.json               manifest: sha256 of the weights, the configuration, what tells the base
                           from others and how it was quantised, how the adapter was trained
tokenizer files            or a vision model's processor, where one was given
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from . import __version__
from .base_model import HUB_ERRORS, load_base_model
from .config import MoeLoraConfig
from .errors import (
    AdapterError,
    ConfigError,
    ExportError,
    MissingDependencyError,
    MoeLoraError,
    first_line,
)
from .files import atomic_directory, sha256_of, write_json
from .manifest import (
    CONFIG_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    deciding_config,
    read_adapter_config,
    read_manifest,
    verify_config,
)
from .marks import write_mark
from .model import find_tuner
from .ops.finite import first_not_finite
from .processors import holds_processor, load_processor
from .quantization import quantization_of, state_of
from .recognition import (
    record_base,
    refuse_other_name,
    refuse_other_weights,
    warn_of_quantization,
)
from .stored import embedding_names

__all__ = [
    "CONFIG_FILE",
    "MANIFEST_FILE",
    "WEIGHTS_FILE",
    "atomic_directory",
    "check_adapter",
    "extend_manifest",
    "load_adapter",
    "read_adapter_config",
    "read_manifest",
    "resolve_adapter",
    "save_adapter",
    "verify_config",
    "verify_weights",
]


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

    What the manifest says of the base is not worth an adapter: where it cannot be had, a warning
    says so.

    Raises:
        ConfigError: `out` holds something and `overwrite` is False.
    """
    adapter = model.active_adapters[0]
    with atomic_directory(out, overwrite=overwrite) as folder:
        state = state_of(model) if quantization_of(model) else None
        model.save_pretrained(str(folder), selected_adapters=[adapter], state_dict=state)
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
                "config": deciding_config(folder),
                **record_base(model),
            },
        )
    return Path(out)


def extend_manifest(folder: Path | str, entries: Mapping[str, Any]) -> None:
    """Add to the manifest of a saved adapter what is known only later.

    Raises:
        AdapterError: the manifest is damaged.
    """
    write_json(Path(folder) / MANIFEST_FILE, {**read_manifest(Path(folder)), **entries})
    write_mark(Path(folder), [MANIFEST_FILE])


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

    The model answers bitwise as that of `PeftModel.from_pretrained`, which is less strict: here the
    weights and the configuration must be those that were saved, every tensor must find its place
    and be finite, and the base must be the one the adapter was trained on.

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
        ConfigError: the base carries an adapter already, or neither the adapter nor the base has a
            tokenizer or processor.
        MissingDependencyError: adapter or base is not a folder and the hub cannot be reached.
    """
    if isinstance(base, nn.Module):
        _refuse_adapted(base)
    adapter = read_adapter_config(resolve_adapter(path))
    recorded = adapter.get("base_model_name_or_path")
    if isinstance(base, PreTrainedModel):
        given: str | None = base.name_or_path or recorded or type(base).__name__
        if given == type(base).__name__ and not holds_processor(resolve_adapter(path), base.config):
            raise ConfigError(
                f"Neither {path} nor the base that is passed, which has no name, has a tokenizer "
                "or processor; save it with the adapter (save_adapter(..., tokenizer=...))."
            )
    else:
        given = base
    folder, name = check_adapter(path, given, allow_base_mismatch=allow_base_mismatch)
    revision = adapter.get("revision") if name == recorded else None
    if isinstance(base, PreTrainedModel):
        base_model = base
    else:
        base_model = load_base_model(name, revision=revision, dtype=dtype, device=device)
    manifest = read_manifest(folder)
    model = _put_on(base_model, folder, name)
    if not allow_base_mismatch:
        refuse_other_weights(model, manifest, name)
    warn_of_quantization(model, manifest, name)
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
        ConfigError: no base is known, or the configuration cannot be.
        MissingDependencyError: not a folder, and the hub cannot be reached.
    """
    folder = resolve_adapter(path)
    content = read_adapter_config(folder)
    _refuse_imports(content, folder)
    verify_config(folder)
    _read_config(folder)  # refuses, before the base takes its time
    recorded = content.get("base_model_name_or_path")
    verify_weights(folder)
    name = base or recorded
    if not name:
        raise ConfigError(f"{CONFIG_FILE} in {folder} names no base model; pass base (--base).")
    if not allow_base_mismatch:
        refuse_other_name(name, recorded)
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


def _refuse_imports(config: Mapping[str, Any], folder: Path) -> None:
    """PEFT imports the module that a LoRA's file calls Megatron's; old releases whatever it is."""
    module = config.get("megatron_core")
    if config.get("megatron_config") and not str(module).startswith("megatron."):
        raise AdapterError(
            f"{CONFIG_FILE} in {folder} wants {module!r} to be imported as megatron_core, which "
            "nothing but Megatron is; take megatron_config out of it."
        )


def _read_config(folder: Path) -> PeftConfig:
    """The configuration as PEFT reads it.

    Raises:
        AdapterError: PEFT cannot.
        ConfigError: one of ours that cannot be carried out.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT says them again when it loads
            kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftConfig._get_peft_type(str(folder))]
            config: PeftConfig = kind.from_pretrained(str(folder))
    except MoeLoraError:
        raise
    except Exception as error:  # a value of a wrong type fails wherever it is first used
        raise AdapterError(
            f"{folder / CONFIG_FILE} holds no configuration that PEFT can read "
            f"({type(error).__name__}: {first_line(error)}); save or download the adapter again."
        ) from error
    return config


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def _put_on(base: PreTrainedModel, folder: Path, name: str) -> PeftModel:
    """The adapter on its base, every tensor in its place.

    Raises:
        AdapterError: it does not fit, lacks tensors, has others, or numbers that are none.
    """
    stored = _stored_shapes(folder)
    # The file's tensors become the parameters, with neither an initialisation nor a copy before:
    # where they are all that our own layers hold, and the base would not round or pack them.
    is_direct = (
        all(".moelora_" in key for key in stored)
        and all(p.dtype in (torch.float32, torch.float64) for p in base.parameters())
        and quantization_of(base) is None
    )
    config = _read_config(folder)
    if isinstance(config, MoeLoraConfig):
        config.stored_shapes = stored
    try:
        with warnings.catch_warnings():
            # PEFT only warns of missing tensors; below they are an error, which says more.
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            model = PeftModel.from_pretrained(
                base, str(folder), config=config, low_cpu_mem_usage=is_direct
            )
    except AdapterError:
        raise
    except Exception as error:  # PEFT's types raise what they happen to run into
        resized = any(f"{key}." in str(error) for key in embedding_names(base))
        how = ", resized as it was then (resize_token_embeddings)" if resized else ""
        raise AdapterError(
            f"The adapter in {folder} does not fit the base {name!r}: {first_line(error)}; pass "
            f"the base it was trained on (--base){how}."
        ) from error
    _refuse_other_tensors(folder, model, set(stored))
    return model


def _refuse_adapted(base: nn.Module) -> None:
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ConfigError(
            "The base that is passed to load_adapter carries an adapter already; unload it first, "
            "or add another to it with its own load_adapter(folder, name)."
        )
    if not isinstance(base, PreTrainedModel):
        raise ConfigError(
            f"The base that is passed to load_adapter is a {type(base).__name__}, not a "
            "transformers model; put the adapter on it with PeftModel.from_pretrained."
        )


def _refuse_other_tensors(folder: Path, model: PeftModel, stored: set[str]) -> None:
    everything = state_of(model)
    state = get_peft_model_state_dict(model, everything, save_embedding_layers=False)
    # PEFT saves embeddings whole where they were resized or are adapted, and reads them again.
    embeddings = tuple(f"{name}." for name in embedding_names(model))
    inside = [key for key in everything if key.startswith(embeddings)]
    whole = {*inside, *(key.replace(f".{model.active_adapter}.", ".") for key in inside)}
    missing, unknown = sorted(set(state) - stored), sorted(stored - set(state) - whole)
    if missing:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE} lacks {len(missing)} of {len(state)} tensors, the first "
            f"being {missing[0]}; save or download it again."
        )
    if unknown:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE} holds {len(unknown)} tensors that have no place in the base, "
            f"the first being {unknown[0]}; pass the base it was trained on (--base)."
        )
    # Our own type has looked while it loaded; once is enough of so much.
    broken = first_not_finite(state) if find_tuner(model) is None else None
    if broken is not None:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE} holds NaN or infinite numbers in {broken}; its training "
            "diverged, or the file is damaged: load an earlier checkpoint."
        )
