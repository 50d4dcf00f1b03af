"""What transformers' own loader of adapters leaves to a line in its log.

`AutoModelForCausalLM.from_pretrained(adapter)` and `model.load_adapter(adapter)` go on where
tensors are missing, with what an initialisation drew in their place, take any values, and put
tensors that are not the adapter's into the base.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from .errors import AdapterError
from .model import active_configs, routed_layers
from .ops.finite import refuse_damaged
from .stored import MARK, refuse_named, saved_whole, tensors_of_base


def tensors_before(model: nn.Module) -> list[Tensor]:
    """What a model consists of before an adapter is loaded for it."""
    return [*model.parameters(), *model.buffers()]


def refuse_damaged_load(
    model: nn.Module, adapter: str, loading_info: Any, before: Collection[Tensor]
) -> None:
    """Look at an adapter of ours that transformers has just loaded for a model.

    Args:
        model: with the adapter.
        adapter: its name; what the file lacks of others is theirs.
        loading_info: what transformers says of the load.
        before: the tensors that the model had before. transformers puts a tensor of a file in the
            place of the model's.

    Raises:
        AdapterError: a tensor of ours was not in the file, or is NaN or infinite; or the file has
            tensors that are not the adapter's.
    """
    if not routed_layers(model):
        return

    def is_own(key: str) -> bool:
        return MARK in key and f".{adapter}." in key.partition(MARK)[2]

    missing = sorted(key for key in getattr(loading_info, "missing_keys", ()) if is_own(key))
    if missing:
        raise AdapterError(
            f"The adapter's file lacks {len(missing)} tensors, the first being {missing[0]}, which "
            "would have random values; save or download it again."
        )
    known = set(map(id, before))
    biases = any(config.bias != "none" for config in active_configs(model).values())
    base = tensors_of_base(model, biases=biases)
    replaced = {name for name, tensor in base.items() if id(tensor) not in known}
    whole = saved_whole(model)
    unknown = (k for k in getattr(loading_info, "unexpected_keys", ()) if not k.startswith(whole))
    refuse_named(replaced.union(unknown))
    refuse_damaged({name: p for name, p in model.named_parameters() if is_own(name)})
