"""Numbers that are none, among many that are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity; None where none does.

    A sum reads memory as fast as it comes and is finite where all its terms are, unless it
    overflows; only then is each value looked at.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        if not torch.isfinite(tensor.detach().sum()) and not torch.isfinite(tensor.detach()).all():
            return name
    return None
