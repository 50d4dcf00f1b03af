"""The base model and what prepares its inputs, as a recipe names them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from .. import processors
from ..base_model import load_base_model, load_config
from ..errors import ConfigError, first_line
from ..processors import tokenizer_of
from .recipe import ModelSection


def load_processor(section: ModelSection) -> Any:
    """The base's processor where it sees images, else its tokenizer, with a padding token.

    Raises:
        ConfigError: it cannot be loaded, or has no token to end an answer with.
        MissingDependencyError: it is not on this machine and the hub does not give it.
    """
    config = load_config(section.name, section.revision)
    processor = processors.load_processor(section.name, config, revision=section.revision)
    tokenizer = tokenizer_of(processor)
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"The tokenizer of {section.name!r} has no eos_token to end an answer with; set it in "
            "its tokenizer_config.json or change model.name."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks follow lengths, so EOS is still trained
    return processor


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
