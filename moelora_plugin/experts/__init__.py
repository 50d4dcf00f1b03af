"""Expert kinds: what one expert's update is. One file each, one line in `EXPERTS`."""

from __future__ import annotations

from .base import ExpertKind, Tensors
from .lora import LoraExperts

EXPERTS: dict[str, type[ExpertKind]] = {
    "lora": LoraExperts,
}

__all__ = ["EXPERTS", "ExpertKind", "LoraExperts", "Tensors"]
