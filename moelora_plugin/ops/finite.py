"""Numbers that are none, among the many that are an adapter's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import AdapterError

# What an adapter is saved in. Others would be read as other values, or be too coarse for it.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def refuse_damaged(tensors: Mapping[str, Tensor]) -> None:
    """Look at tensors of an adapter that are about to be its parameters.

    Raises:
        AdapterError: one is NaN or infinite, or is ours and no real number of 16 to 64 bits; only
            counts of modifiers are whole.
    """
    others = (
        name
        for name, tensor in tensors.items()
        if tensor.dtype not in _DTYPES and ".moelora_" in name and ".moelora_modifiers." not in name
    )
    first = next(others, None)
    if first is not None:
        raise AdapterError(
            f"The adapter's tensor {first} is of {tensors[first].dtype}, which holds no weights of "
            "an adapter; the file is damaged: save or download it again."
        )
    broken = first_not_finite(tensors)
    if broken is not None:
        raise AdapterError(
            f"The adapter's tensor {broken} holds NaN or infinite numbers; its training diverged, "
            "or the file is damaged: load an earlier checkpoint."
        )


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity; None where none does.

    A sum reads memory as fast as it comes and is finite where all its terms are, unless it
    overflows; only then is each value looked at.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        values = tensor.detach()
        values = values.float() if values.itemsize == 1 else values  # torch cannot add up 8 bits
        if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
            return name
    return None
