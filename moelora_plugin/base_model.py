"""Loading the base model that an adapter sits on, and what prepares its inputs."""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from .errors import ConfigError, MissingDependencyError, first_line

# What huggingface_hub and transformers raise when a name is neither a folder nor to be had from the
# hub.
HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)

DTYPES = ("auto", "float32", "bfloat16", "float16")


def default_device() -> str:
    """The accelerator where there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"


def resolve_dtype(dtype: str, device: str) -> torch.dtype | str:
    """What transformers takes for `dtype`.

    "auto" means the checkpoint's own dtype on an accelerator and float32 on a CPU, where half
    precision is many times slower.

    Raises:
        ConfigError: not one of DTYPES.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}.")
    if dtype == "auto":
        return torch.float32 if device == "cpu" else "auto"
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved


def load_base_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
) -> PreTrainedModel:
    """A language model from a folder or the hub, on `device`: text alone, or text with images.

    Raises:
        MissingDependencyError: no such folder, and the hub cannot be reached or does not know it.
        ConfigError: the folder holds no such model, dtype is unknown, or there is no such device.
    """
    device = device or default_device()
    _check_device(device)
    config = load_config(name, revision)
    auto = AutoModelForImageTextToText if shows_images(config) else AutoModelForCausalLM
    weights = resolve_dtype(dtype, device)
    try:
        model: nn.Module = auto.from_pretrained(
            name, config=config, revision=revision, dtype=weights, trust_remote_code=False
        )
    except (*HUB_ERRORS, ValueError) as error:
        raise _not_loaded(name, error, "--base") from error
    return cast(PreTrainedModel, model.to(device))


def load_config(
    name: str, revision: str | None = None, *, option: str = "--base"
) -> PretrainedConfig:
    """The configuration of a model, which tells what it is before its weights are read.

    Args:
        name: its folder or hub id, maybe out of somebody's file: no other kind of file is opened.
        revision: branch, tag or commit on the hub.
        option: the command's option that names it, for the error.

    Raises:
        MissingDependencyError: no such folder, and the hub cannot be reached or does not know it.
        ConfigError: the folder holds no model that transformers knows, or the name is a file's.
    """
    if os.path.exists(name) and not os.path.isdir(name):  # transformers would read it as JSON
        raise ConfigError(
            f"Base model {name!r} is a file; pass the folder of a model (model.name in a recipe, "
            f"{option} on the command line)."
        )
    try:
        # Left open, transformers asks whoever sits at the terminal.
        config: PretrainedConfig = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=False
        )
    except (*HUB_ERRORS, ValueError) as error:
        raise _not_loaded(name, error, option) from error
    return config


def shows_images(model_or_config: Any) -> bool:
    """Whether a model, adapted or not, can be shown images beside text (LLaVA, Qwen-VL, ...)."""
    config = getattr(model_or_config, "config", model_or_config)
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # not compiled in, not there, not a device
        raise ConfigError(
            f"The device {device!r} cannot be used here ({first_line(error)}); change --device."
        ) from error


def _not_loaded(name: str, error: Exception, option: str) -> ConfigError | MissingDependencyError:
    if os.path.isdir(name):
        return ConfigError(
            f"Cannot load a model from {name} ({first_line(error)}); pass another one (model.name "
            f"in a recipe, {option} on the command line)."
        )
    return MissingDependencyError(
        f"Base model {name!r} is not a folder and cannot be had from the hub; pass the path of "
        f"a local copy (model.name in a recipe, {option} on the command line)."
    )
