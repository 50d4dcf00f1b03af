"""Prompts as token ids, from texts or from batches.

Shape suffixes: N prompts, S positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DataError

Prompts = list[list[int]]


def read_prompts(
    source: Sequence[str] | Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None = None
) -> Prompts:
    """The token ids of each prompt.

    A prompt is what stands before the answer, so that training and inference see the same of it.

    Args:
        source: texts; or a batch or the columns of examples, with `input_ids` and, where there are,
            `attention_mask` (0 is padding) and `labels` (the answer begins where they stop being
            -100). Rows are tensors or lists.
        tokenizer: the base's; needed for texts.

    Raises:
        ConfigError: texts without a tokenizer.
        DataError: a prompt has fewer than two tokens.
    """
    if isinstance(source, Mapping):
        ids = source["input_ids"]
        masks = source.get("attention_mask", [None] * len(ids))
        labels = source.get("labels", [None] * len(ids))
        prompts = [_prompt(*row) for row in zip(ids, masks, labels, strict=True)]
    elif tokenizer is None:
        raise ConfigError("Clusters of texts need a tokenizer; pass tokenizer, or a batch of ids.")
    else:
        prompts = [tokenizer.encode(text) for text in source]
    short = next((number for number, prompt in enumerate(prompts) if len(prompt) < 2), None)
    if short is not None:
        raise DataError(
            f"Prompt {short} has {len(prompts[short])} tokens before its answer, and a cluster "
            "needs at least 2; remove the row."
        )
    return prompts


def pad(prompts: Prompts, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask (N, S), padded on the right with what a mask hides anyway."""
    length = max(len(prompt) for prompt in prompts)
    ids_NS = torch.tensor([[*prompt, *[0] * (length - len(prompt))] for prompt in prompts])
    lengths_N = torch.tensor([len(prompt) for prompt in prompts])
    mask_NS = torch.arange(length) < lengths_N[:, None]
    return ids_NS.to(device), mask_NS.long().to(device)


def _prompt(ids: Any, mask: Any, labels: Any) -> list[int]:
    tokens = [int(token) for token in ids]
    kept = [True] * len(tokens) if mask is None else [bool(m) for m in mask]
    trained = [] if labels is None else [int(label) != -100 for label in labels]
    end = trained.index(True) if True in trained else len(tokens)
    return [token for token, keep in zip(tokens[:end], kept[:end], strict=True) if keep]
