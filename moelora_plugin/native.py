"""What transformers' own loader of adapters leaves to a line in its log.

`AutoModelForCausalLM.from_pretrained(adapter)` and `model.load_adapter(adapter)` go on where
tensors are missing, with what an initialisation drew in their place, and take any values.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import AdapterError
from .model import MoeLoraModel, routed_layers
from .ops.finite import first_not_finite


def refuse_incomplete(model: nn.Module, loading_info: Any) -> None:
    """Look at the adapters of ours on a model that transformers has just loaded one for.

    Args:
        model: with the adapter.
        loading_info: what transformers says of the load.

    Raises:
        AdapterError: a tensor of ours was not in the file, or is NaN or infinite.
    """
    if not routed_layers(model):
        return
    mark = f".{MoeLoraModel.prefix}"
    missing = sorted(k for k in getattr(loading_info, "missing_keys", ()) if mark in k)
    if missing:
        raise AdapterError(
            f"The adapter's file lacks {len(missing)} tensors, the first being {missing[0]}, which "
            "would have random values; save or download it again."
        )
    broken = first_not_finite({name: p for name, p in model.named_parameters() if mark in name})
    if broken is not None:
        raise AdapterError(
            f"The adapter's tensor {broken} holds NaN or infinite numbers; its training diverged, "
            "or the file is damaged: load an earlier checkpoint."
        )
