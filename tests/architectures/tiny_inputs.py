"""A batch that an architecture can be called with, from its configuration and its forward alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from tiny_config import TEXT_TOKENS
from torch import Tensor, nn

BATCH, LENGTH = 2, 12
Inputs = dict[str, Any]


def batches(model: nn.Module, task: str) -> Iterator[tuple[str, Inputs]]:
    """Batches to try, the fullest first, each with what is to be said of it."""
    torch.manual_seed(1)
    names = set(inspect.signature(model.forward).parameters)
    if task == "vision":
        yield "", {"pixel_values": _images(model.config)}
        return
    if task == "vision-text":
        if "image_grid_thw" in names:
            yield "", _text(model, names, **_patches(model.config))
        if "pixel_values" in names:
            for images in _pictures(model, names):
                yield "", images
        yield "text only", _text(model, names)
        return
    yield "", _text(model, names)


def _text(model: nn.Module, names: set[str], image_tokens: int = 0, **more: Any) -> Inputs:
    ids = torch.randint(3, TEXT_TOKENS, (BATCH, LENGTH + image_tokens))
    if image_tokens:
        ids[:, 1 : 1 + image_tokens] = _image_token(model.config)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = torch.randint(3, TEXT_TOKENS, (BATCH, LENGTH))
    if "mm_token_type_ids" in names:
        inputs["mm_token_type_ids"] = (ids == _image_token(model.config)).long()
    if "token_type_ids" in names and image_tokens:
        inputs["token_type_ids"] = (ids == _image_token(model.config)).long()
    inputs = {n: v for n, v in inputs.items() if n in names or n == "input_ids"}
    return {**inputs, **more}


def _image_token(config: Any) -> int:
    for name in ("image_token_id", "image_token_index", "image_token", "im_patch_id"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return -1


def _vision(config: Any) -> Any:
    return getattr(config, "vision_config", None) or config


def _images(config: Any, count: int = BATCH) -> Tensor:
    config = _vision(config)
    size = getattr(config, "image_size", None) or 32
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = next(
        (c for n in ("num_channels", "in_channels", "in_chans") if (c := getattr(config, n, None))),
        3,
    )
    return torch.randn(count, channels, height, width)


def _patches(config: Any) -> Inputs:
    """As Qwen-VL's processors cut images: rows of patches and how many there are each way."""
    vision = _vision(config)
    side = getattr(vision, "spatial_merge_size", 2) * 2
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or 3
    width = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    return {
        "pixel_values": torch.randn(BATCH * side * side, width),
        "image_grid_thw": torch.tensor([[1, side, side]] * BATCH),
        "image_tokens": 4,
    }


def _pictures(model: nn.Module, names: set[str]) -> Iterator[Inputs]:
    """Whole images, and as many image tokens as the model makes features of one."""
    pixels = _images(model.config)
    size = tuple(pixels.shape[-2:])
    more: Inputs = {}
    if "image_sizes" in names:
        more["image_sizes"] = torch.tensor([size] * BATCH)
    for values in (pixels, pixels[:, None]):
        given = {"pixel_values": values, **more}
        try:
            with torch.no_grad():
                found = model.get_image_features(**given)
            yield _text(model, names, _rows(found), **given)
        except Exception:
            continue
    yield _text(model, names, **more, pixel_values=pixels)


def _rows(features: Any) -> int:
    """How many rows of features one image has."""
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(features, name, None) is not None:
            features = getattr(features, name)
            break
    if isinstance(features, tuple | list):
        return int(features[0].shape[-2]) if features[0].ndim > 1 else len(features[0])
    return int(features.shape[-2]) if features.ndim == 3 else int(features.shape[0]) // BATCH
