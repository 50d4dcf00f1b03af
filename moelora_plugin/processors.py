"""What turns a model's inputs into tensors: the tokenizer, or the processor of a vision model.

transformers reads images with Pillow where torchvision is not installed, but takes torchvision for
granted where a processor reads videos as well. Nothing here shows videos, so those are left out.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import transformers
from transformers import PROCESSOR_MAPPING, AutoTokenizer, PretrainedConfig
from transformers.utils.import_utils import is_torchvision_available, is_vision_available

from .base_model import shows_images
from .errors import ConfigError, MissingDependencyError, first_line


def load_processor(name: str, config: PretrainedConfig, *, revision: str | None = None) -> Any:
    """The processor of a vision model, or the tokenizer of any other.

    Args:
        name: folder or hub id of the model, or folder of an adapter that it was saved beside.
        config: the model's configuration, which tells which of the two it has.
        revision: branch, tag or commit on the hub.

    Raises:
        ConfigError: its files are missing or cannot be read.
        MissingDependencyError: the hub cannot be reached, or a package is missing (Pillow).
    """
    if shows_images(config) and not is_vision_available():
        raise MissingDependencyError(
            f"{name!r} is a vision model, and images need Pillow, which is not installed; run pip "
            "install 'moelora[vision]'."
        )
    kind = "processor" if shows_images(config) else "tokenizer"
    try:
        loader = _processor_class(config) if shows_images(config) else AutoTokenizer
        return loader.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except ImportError as error:
        raise MissingDependencyError(
            f"The {kind} of {name!r} cannot be loaded ({first_line(error)}); install what is "
            "missing."
        ) from error
    except Exception as error:  # whatever a damaged file makes a tokenizer's library raise
        if os.path.isdir(name):
            raise ConfigError(
                f"{name} holds a model but no {kind} that can be read ({first_line(error)}); save "
                f"its {kind} there, or change --base (model.name in a recipe)."
            ) from error
        raise MissingDependencyError(
            f"The {kind} of {name!r} cannot be had from the hub ({first_line(error)}); pass the "
            "path of a local copy (--base, or model.name in a recipe)."
        ) from error


def holds_processor(folder: Path, config: PretrainedConfig) -> bool:
    """Whether a folder has what `load_processor` reads for a model with this configuration."""
    # Before transformers 5 some processors were saved as their image processor alone.
    files = ("processor_config.json", "preprocessor_config.json")
    needed = files if shows_images(config) else ("tokenizer_config.json",)
    return any((folder / file).is_file() for file in needed)


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer inside a processor; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


def image_text(processor: Any) -> str:
    """What stands for an image in a prompt; the processor puts as many tokens as it needs there.

    The Qwen models were trained with a mark before and after each image, which their chat template
    writes and their processor does not.
    """
    token: str = processor.image_token
    marks = "<|vision_start|>", "<|vision_end|>"
    if all(mark in processor.tokenizer.get_vocab() for mark in marks):
        return token.join(marks)
    return token


def _processor_class(config: PretrainedConfig) -> Any:
    """A model's processor class, without its videos where torchvision is missing."""
    known: Any = PROCESSOR_MAPPING[type(config)]
    if is_torchvision_available() or "video_processor" not in known.get_attributes():
        return known
    if known.__name__ == "SmolVLMProcessor":  # Idefics3's with videos: images become the same text
        return transformers.Idefics3Processor
    return _without_videos(known)


@functools.cache
def _without_videos(known: Any) -> Any:
    """A processor class that has no part for videos."""
    parts = [part for part in known.get_attributes() if part != "video_processor"]
    changes = {
        "get_attributes": classmethod(lambda cls: parts),
        # For the workers of a data loader, which find no such class in any module.
        "__reduce__": lambda self: (_rebuilt, (known, vars(self))),
    }
    # By the class's own name, since that is written into processor_config.json.
    return type(known.__name__, (known,), changes)


def _rebuilt(known: Any, attributes: dict[str, Any]) -> Any:
    """A processor without videos from its pickle."""
    kind = _without_videos(known)
    processor = kind.__new__(kind)
    vars(processor).update(attributes)
    return processor
