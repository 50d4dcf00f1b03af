"""Which weights are plain floating-point numbers, and what the others are.

Quantised weights come as integers with scales beside them (bitsandbytes, GPTQ, HQQ), as float8 (FP8
linears), or as subclasses of Tensor that say they are bfloat16 (torchao).
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
# How packed weights are called: GPTQ's and AWQ's qweight, HQQ's W_q, gpt-oss's blocks.
_PACKED_NAMES = ("weight", "W_q", "blocks")


def is_plain(weight: object) -> TypeGuard[Tensor]:
    """Whether a weight is its own numbers, which can be read, decomposed and added to.

    Shards (DTensor) and the stand-ins that shapes are counted with (FakeTensor) are.
    """
    return (
        isinstance(weight, Tensor)
        and weight.dtype in _DTYPES
        and (
            type(weight) in (Tensor, nn.Parameter)
            or hasattr(weight, "full_tensor")
            or hasattr(weight, "fake_mode")
        )
    )


def quantization_of(model: nn.Module) -> str | None:
    """How the model's weights are quantised, in words ("Params4bit nf4"); None where none is."""
    kinds = {kind for module in model.modules() for kind in _kinds(module)}
    return ", ".join(sorted(kinds)) or None


def _kinds(module: nn.Module) -> set[str]:
    """The kinds of packed weights that a module holds itself."""
    kinds = set()
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None or is_plain(tensor):
            continue
        if type(tensor) not in (Tensor, nn.Parameter):
            kinds.add(" ".join((type(tensor).__name__, getattr(tensor, "quant_type", ""))).strip())
        elif any(part in name for part in _PACKED_NAMES):
            kinds.add(type(module).__name__)
    return kinds
