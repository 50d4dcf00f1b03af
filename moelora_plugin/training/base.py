"""The base model and its tokenizer, as a recipe names them."""

from __future__ import annotations

import os

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..base_model import HUB_ERRORS, load_base_model
from ..errors import ConfigError, MissingDependencyError, first_line
from .recipe import ModelSection


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with a padding token.

    Raises:
        ConfigError: it cannot be loaded, or has no token to end an answer with.
        MissingDependencyError: it is not on this machine and the hub does not give it.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            section.name, revision=section.revision
        )
    except (*HUB_ERRORS, ValueError) as error:
        if os.path.isdir(section.name):
            raise ConfigError(
                f"No tokenizer loads from {section.name!r} ({first_line(error)}); change "
                "model.name to the folder of a causal language model."
            ) from error
        raise MissingDependencyError(
            f"Base model {section.name!r} is not a folder and cannot be had from the hub; pass a "
            "local copy with model.name=FOLDER."
        ) from error
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"The tokenizer of {section.name!r} has no eos_token to end an answer with; set it in "
            "its tokenizer_config.json or change model.name."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks follow lengths, so EOS is still trained
    return tokenizer


def load_model(section: ModelSection, device: str) -> PreTrainedModel:
    """The base on `device`, in the dtype and with the attention the recipe asks for.

    Raises:
        ConfigError: it cannot be loaded, or has no such attention.
        MissingDependencyError: it is not on this machine and the hub does not give it.
    """
    model = load_base_model(
        section.name, revision=section.revision, dtype=section.dtype, device=device
    )
    if section.attn_implementation is not None:
        try:
            model.set_attn_implementation(section.attn_implementation)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"model.attn_implementation={section.attn_implementation!r} cannot be used here "
                f"({first_line(error)}); change or remove it."
            ) from error
    return model
