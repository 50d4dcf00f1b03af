"""A batch that an architecture can be called with, from its configuration and its model alone."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from tiny_config import VOCABULARY
from torch import Tensor, nn

BATCH, LENGTH = 2, 12


def text_inputs(model: nn.Module, length: int = LENGTH) -> dict[str, Tensor]:
    """Ids of ordinary tokens and what else the forward needs for text."""
    torch.manual_seed(1)
    names = inspect.signature(model.forward).parameters
    ids = torch.randint(3, 90, (BATCH, length))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = torch.randint(3, 90, (BATCH, length))
    return {name: value for name, value in inputs.items() if name in names or "kwargs" in names}


def image_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Images for a vision model."""
    torch.manual_seed(1)
    config = model.config
    size = getattr(config, "image_size", 32)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return {"pixel_values": torch.randn(BATCH, getattr(config, "num_channels", 3), height, width)}
