"""lm-eval's view of a causal language model."""

from __future__ import annotations

import copy
from typing import Any

from lm_eval.models.huggingface import HFLM

from .quiet import quiet


def text_lm(model: Any, tokenizer: Any, batch_size: int) -> HFLM:
    """A language model in memory, for lm-eval."""
    with quiet("lm_eval.models.huggingface"):  # warns that the model was not loaded by lm-eval
        return HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # lm-eval sets a pad token where there is none
            batch_size=batch_size,
            softmax_dtype="float32",  # in bf16 two answers would often tie
        )
