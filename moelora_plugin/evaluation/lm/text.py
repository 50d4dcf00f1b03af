"""lm-eval's view of a causal language model."""

from __future__ import annotations

from lm_eval.models.huggingface import HFLM

from .shared import SharedLM


class MoeLoraLM(SharedLM, HFLM):  # type: ignore[misc]  # lm-eval has no types
    """A language model, with an adapter or without; lm-eval's command line calls it "moelora"."""
