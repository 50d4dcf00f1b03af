"""The models as lm-eval sees them: text and vision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .quiet import quiet

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

__all__ = ["quiet", "wrap"]


def wrap(model: Any, processor: Any, batch_size: int) -> HFLM:
    """lm-eval's view of a model in memory.

    Args:
        model: a causal language model, or a PeftModel of one.
        processor: its tokenizer.
        batch_size: rows per forward pass.
    """
    from .text import text_lm

    return text_lm(model, processor, batch_size)
