"""One training example: the prompt that evaluation scores, answered, as tokens.

An example is `prompt.context + prompt.choices[prompt.gold]`, tokenised as lm-eval tokenises a
log-likelihood request, and EOS. The loss is on the answer and EOS only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moelora_eval_tasks.prompts import Prompt

from ..call import ROUTING_IDS
from ..errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100  # the label that transformers' losses leave out


def build_example(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_length: int
) -> dict[str, Any]:
    """Tokens and labels of one answered prompt.

    Args:
        tokenizer: the base model's.
        prompt: the rendered row.
        max_length: tokens in the example; a longer context is cut from its left.

    Returns:
        `input_ids`, `labels` (-100 up to the answer) and whether the context was `cut`.

    Raises:
        DataError: the answer alone is too long, or the tokenizer changes the context's tokens
            when the answer follows.
    """
    context, answer = encode_pair(tokenizer, prompt.context, prompt.choices[prompt.gold])
    answer = [*answer, tokenizer.eos_token_id]
    room = max_length - len(answer)
    if room < 1:
        raise DataError(
            f"The answer {prompt.choices[prompt.gold]!r} has {len(answer)} tokens, which leaves no "
            f"room for its question in {max_length}; raise data.max_length."
        )
    cut = len(context) > room
    if cut:
        # BOS stays in front: models lean on it, and evaluation will show it.
        start = context[:1] if context[0] == tokenizer.bos_token_id else []
        context = start + context[len(context) - room + len(start) :]
    return {
        "input_ids": context + answer,
        "labels": [IGNORED_LABEL] * len(context) + answer,
        "cut": cut,
    }


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, context: str, answer: str
) -> tuple[list[int], list[int]]:
    """The tokens of `context` and of `answer` after it, as lm-eval's HFLM splits them.

    The whole is encoded at once and split at the context's own length, so that an answer's first
    token is the one the model meets in running text.

    Raises:
        DataError: the context's tokens are not the beginning of the whole's, as with a tokenizer
            that ends every text with a special token.
    """
    whole = _encode(tokenizer, context + answer)
    before = _encode(tokenizer, context)
    if whole[: len(before)] != before or len(whole) == len(before):
        raise DataError(
            f"The tokenizer of {tokenizer.name_or_path!r} does not keep a prompt's tokens when "
            f"{answer!r} follows; switch off its end-of-text token or choose another model.name."
        )
    return before, whole[len(before) :]


@dataclass(frozen=True)
class AnswerCollator:
    """Pads a batch of examples on the right, to the longest.

    Attributes:
        pad_token_id: fills `input_ids`; it may equal EOS, since masks follow lengths, not tokens.
        pad_to_multiple_of: rounds the length up, for hardware that likes it.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels`, each (examples, length).

        And the examples' `task_id` and `cluster_id` (examples,) where they have them.
        """
        longest = max(len(example["input_ids"]) for example in examples)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of

        def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([[*row, *[filler] * (length - len(row))] for row in rows])

        tokens = [list(example["input_ids"]) for example in examples]
        return {
            "input_ids": padded(tokens, self.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in tokens], 0),
            "labels": padded([list(example["labels"]) for example in examples], IGNORED_LABEL),
            **{
                name: torch.tensor([example[name] for example in examples])
                for name in ROUTING_IDS
                if name in examples[0]
            },
        }


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """lm-eval's rule: with the tokenizer's special tokens, unless `text` begins with BOS itself."""
    prefix = tokenizer.eos_token if tokenizer.bos_token is None else tokenizer.bos_token
    tokens: list[int] = (
        tokenizer.encode(text, add_special_tokens=False)
        if text.startswith(prefix)
        else tokenizer.encode(text)
    )
    return tokens
