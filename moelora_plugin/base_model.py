"""Loading the base model that an adapter sits on."""

from __future__ import annotations

import os
from typing import cast

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .errors import ConfigError, MissingDependencyError

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
    """A causal language model from a folder or the hub, on `device`.

    Raises:
        MissingDependencyError: no such folder, and the hub cannot be reached or does not know it.
        ConfigError: the folder holds no causal language model, or dtype is unknown.
    """
    device = device or default_device()
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=resolve_dtype(dtype, device)
        )
    except HUB_ERRORS as error:
        if os.path.isdir(name):
            raise ConfigError(f"Cannot load a model from {name}: {error}") from error
        raise MissingDependencyError(
            f"Base model {name!r} is not a folder and cannot be had from the hub; pass the path of "
            "a local copy (model.name in a recipe, --base on the command line)."
        ) from error
    return cast(PreTrainedModel, model.to(device))
