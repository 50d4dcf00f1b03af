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
# Where a module keeps what it names itself, and what is no part of it.
_REGISTERED = ("_parameters", "_buffers", "_modules", "module", "grad_fn")


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


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and saved buffers by name, as its `state_dict` has them.

    That asks the modules, and bitsandbytes' linears, packed for a CPU, then change their weights.
    """
    lasting = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in module._buffers.keys() - module._non_persistent_buffers_set
    }
    buffers = model.named_buffers(remove_duplicate=False)
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **{name: buffer for name, buffer in buffers if name in lasting},
    }


def hidden_tensors(owner: object, depth: int = 3) -> list[tuple[str, Tensor]]:
    """Tensors that a packed weight, or a module that holds one, has among its attributes.

    Scales and code books are there: bitsandbytes' `quant_state`, HQQ's `meta`.
    """
    found: list[tuple[str, Tensor]] = []
    values = owner if isinstance(owner, dict) else getattr(owner, "__dict__", {})
    for name, value in values.items():
        if isinstance(value, Tensor):
            found.append((str(name), value))
        elif depth and not isinstance(value, nn.Module) and name not in _REGISTERED:
            inner = hidden_tensors(value, depth - 1)
            found += [(f"{name}.{key}", tensor) for key, tensor in inner]
    return found


def is_packed(module: nn.Module) -> bool:
    """Whether a module itself holds a quantised weight."""
    return bool(_kinds(module))


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
