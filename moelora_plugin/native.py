"""What transformers' own loader of adapters leaves to a line in its log.

`AutoModelForCausalLM.from_pretrained(adapter)` and `model.load_adapter(adapter)` go on where
tensors are missing, with what an initialisation drew in their place, and take any values.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import AdapterError
from .model import MoeLoraModel, routed_layers
from .ops.finite import refuse_damaged


def refuse_incomplete(model: nn.Module, adapter: str, loading_info: Any) -> None:
    """Look at an adapter of ours that transformers has just loaded for a model.

    Args:
        model: with the adapter.
        adapter: its name; what the file lacks of others is theirs.
        loading_info: what transformers says of the load.

    Raises:
        AdapterError: a tensor of ours was not in the file, or is NaN or infinite.
    """
    if not routed_layers(model):
        return
    mark = f".{MoeLoraModel.prefix}"

    def is_own(key: str) -> bool:
        return mark in key and f".{adapter}." in key.partition(mark)[2]

    missing = sorted(key for key in getattr(loading_info, "missing_keys", ()) if is_own(key))
    if missing:
        raise AdapterError(
            f"The adapter's file lacks {len(missing)} tensors, the first being {missing[0]}, which "
            "would have random values; save or download it again."
        )
    refuse_damaged({name: p for name, p in model.named_parameters() if is_own(name)})
