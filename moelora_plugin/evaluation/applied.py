"""Refuse to score an adapter that is loaded and does nothing.

Hosts have ignored adapters in silence before (a renamed module, a base loaded after the adapter),
and then a benchmark reports the base's scores as the adapter's.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import AdapterError
from ..model import moelora_layers


def require_applied(model: Any, token_ids: list[int]) -> None:
    """Compare the logits of one prompt with and without the adapter.

    An adapter whose experts are all zero is legal and scores as its base does; so is one where some
    experts are zero, as those may be the selected ones. Only where a layer has no zero expert must
    its output change.

    Args:
        model: any model; one whose adapter cannot be switched off passes.
        token_ids: a prompt.

    Raises:
        AdapterError: experts are trained, yet the logits are bitwise those of the base.
    """
    if not hasattr(model, "disable_adapter") or not _must_change(model):
        return
    ids = torch.tensor([token_ids], device=model.device)
    with torch.inference_mode():
        adapted = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
    if torch.equal(adapted, base):
        raise AdapterError(
            "The adapter has trained experts but the logits are exactly the base's, so it is not "
            "applied; load it with moelora_plugin.load_adapter and check that it is enabled."
        )


def _must_change(model: Any) -> bool:
    """Whether some layer has an active adapter with every expert's B A non-zero.

    Layers that see images alone say nothing, since the prompt is shown without its images.
    Expert kinds without such factors say nothing.
    """
    return any(
        all(bool(a.any()) and bool(b.any()) for a, b in experts)
        for layer in moelora_layers(model).values()
        if not layer.sees_images
        for adapter in getattr(model, "active_adapters", [])
        if adapter in layer.moelora_mixture and (experts := layer.expert_weights(adapter))
    )
