"""A host's options as a MoeLoraConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import MoeLoraConfig

DEFAULT_PRESET = "moe_lora"


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
    given = {**(host_words or {}), **{k: v for k, v in options.items() if v is not None}}
    fields = {"task_type": "CAUSAL_LM", **{k: v for k, v in given.items() if v is not None}}
    return MoeLoraConfig.from_preset(fields.pop("preset", DEFAULT_PRESET), **fields)
