"""The models as lm-eval sees them: text and vision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...base_model import shows_images
from .quiet import quiet

if TYPE_CHECKING:
    from accelerate import PartialState

    from .shared import SharedLM

__all__ = ["quiet", "wrap"]


def wrap(
    model: Any, processor: Any, batch_size: int | str, processes: PartialState | None = None
) -> SharedLM:
    """lm-eval's view of a model in memory.

    Args:
        model: a language model, a vision model, or a PeftModel of one.
        processor: its tokenizer or, of a vision model, its processor.
        batch_size: rows per forward pass, or "auto".
        processes: those that share the rows; None is this one alone.
    """
    if shows_images(model):
        from .vision import VisionLM

        return VisionLM(model, processor, batch_size=batch_size, processes=processes)
    from .text import MoeLoraLM

    return MoeLoraLM(model, processor, batch_size=batch_size, processes=processes)
