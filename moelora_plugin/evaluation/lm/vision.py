"""lm-eval's view of a vision model.

lm-eval 0.4.13 writes answers about images with its HFMultimodalLM, but does not score them by
log-likelihood, does not take a processor in memory, and cuts a long prompt from its left, which
can cut through an image. This class adds the first two and refuses the third.

Requests without an image go to lm-eval's text class, whatever their task, and so get its numbers.
"""

from __future__ import annotations

import gc
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.models.hf_vlms import HFMultimodalLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...errors import DataError
from ...processors import image_text
from .shared import SharedLM

LogLikelihood = tuple[float, bool]
# What a processor gives per token; all else is about images.
PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class Row:
    """What is asked about one document: the answers to score after one prompt.

    Attributes:
        context: the prompt.
        images: its images.
        requests: places of its requests among all.
        answers: the tokens of each answer.
    """

    context: str
    images: list[Any]
    requests: list[int]
    answers: list[tuple[int, ...]]

    @property
    def beginnings(self) -> list[tuple[int, ...]]:
        """What the model must read after the context: each answer but for its last token.

        Answers of one token all have the empty one, so that one forward pass scores them.
        """
        return list(dict.fromkeys(answer[:-1] for answer in self.answers))


class _ImageTextLM(HFMultimodalLM):  # type: ignore[misc]  # lm-eval has no types
    """Scores and writes answers about images.

    Args:
        pretrained: the model, or a PeftModel of one.
        tokenizer: its processor.
        options: of lm-eval's class.
    """

    def __init__(self, pretrained: Any, tokenizer: Any, **options: Any) -> None:
        marks = image_text(tokenizer)
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, image_string=marks, **options)

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **_: Any) -> None:
        """Takes the processor, which lm-eval drops where it is not loaded by name."""
        self.processor, self.tokenizer = tokenizer, tokenizer.tokenizer

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[LogLikelihood]:
        """Log-likelihood of each request's answer, and whether it is the greedy one."""
        text = super().loglikelihood
        return _by_kind(requests, lambda some: text(some, disable_tqdm), self._loglikelihood)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each request's prompt."""
        write = super().generate_until
        gc.freeze()  # lm-eval collects garbage after each batch, and with it all that is imported
        try:
            return _by_kind(requests, *2 * [lambda some: write(some, disable_tqdm)])
        finally:
            gc.unfreeze()

    def tok_batch_multimodal_encode(
        self,
        strings: list[str],
        images: list[list[Any]],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> Any:
        """lm-eval's own, which would cut a prompt to `left_truncate_len` tokens.

        Raises:
            DataError: a prompt is longer than that.
        """
        decoded = [list(row) for row in images]  # a task's images are decoded as they are taken
        encoding = super().tok_batch_multimodal_encode(strings, decoded, padding_side)
        for text, length in zip(strings, encoding["attention_mask"].sum(1).tolist(), strict=True):
            if left_truncate_len is not None and length > left_truncate_len:
                raise DataError(
                    f"The prompt {textwrap.shorten(text, 80)!r} has {length} tokens with its "
                    f"images, and the model has room for {left_truncate_len}; lower the images' "
                    "size in the model's processor_config.json, or change --tasks."
                )
        return encoding

    def _loglikelihood(self, requests: Sequence[Instance]) -> list[LogLikelihood]:
        """Score the answers of prompts with images."""
        found: dict[int, LogLikelihood] = {}
        rows = sorted(self._rows(requests), key=lambda row: -len(row.context))
        for start in range(0, len(rows), self.batch_size):
            for place, value in self._score(rows[start : start + self.batch_size]):
                found[place] = value
                self.cache_hook.add_partial("loglikelihood", requests[place].args[:2], value)
        return [found[place] for place in range(len(requests))]

    def _rows(self, requests: Sequence[Instance]) -> Iterator[Row]:
        """Requests that follow each other and are about the same images and prompt."""

        def row_of(place: int) -> tuple[str, int]:
            return requests[place].args[0], id(_images_of(requests[place]))

        for (context, _), group in groupby(range(len(requests)), row_of):
            places = list(group)
            yield Row(
                context=context.rstrip(),  # white space belongs to the answer, as in lm-eval
                images=_images_of(requests[places[0]]),
                requests=places,
                answers=[
                    tuple(self._encode_pair(context, requests[place].args[1])[1])
                    for place in places
                ],
            )

    def _score(self, rows: Sequence[Row]) -> Iterator[tuple[int, LogLikelihood]]:
        """The value of each request of a batch of rows.

        The images are prepared once. There is a forward pass for the first beginning of every row,
        one for the second, and so on.
        """
        longest = max(len(answer) for row in rows for answer in row.answers)
        encoding = self.tok_batch_multimodal_encode(
            [row.context for row in rows],
            [row.images for row in rows],
            padding_side="right",  # positions count from the prompt's first token, as in training
            left_truncate_len=self.max_length + 1 - longest,
        )
        lengths = encoding["attention_mask"].sum(1).tolist()
        first = min(lengths) - 1  # the first position whose logits are needed
        for turn in range(max(len(row.beginnings) for row in rows)):
            # A row that has no more of them goes along with its last: the images stay the same.
            beginnings = [row.beginnings[: turn + 1][-1] for row in rows]
            inputs = self._continued(encoding, lengths, beginnings)
            positions = torch.arange(first, inputs["input_ids"].shape[1], device=self.device)
            with torch.no_grad():
                logits = self.model(**inputs, logits_to_keep=positions, use_cache=False).logits
            for row, beginning, length, own in zip(rows, beginnings, lengths, logits, strict=True):
                if turn < len(row.beginnings):
                    start = length - 1 - first
                    scored = own[start : start + len(beginning) + 1]
                    log_probs = F.log_softmax(scored, dim=-1, dtype=self.softmax_dtype)
                    yield from _values(row, beginning, log_probs)

    def _continued(
        self, encoding: Any, lengths: Sequence[int], beginnings: Sequence[tuple[int, ...]]
    ) -> dict[str, Tensor]:
        """The inputs with more tokens after each context, padded on the right."""
        inputs = dict(encoding)
        for name in PER_TOKEN:
            if name in inputs:
                rows = []
                for row, length, beginning in zip(inputs[name], lengths, beginnings, strict=True):
                    fill = int(name == "attention_mask")  # 0 is the type of text
                    added = beginning if name == "input_ids" else [fill] * len(beginning)
                    rows.append(torch.cat([row[:length], row.new_tensor(added)]))
                padding = self.tokenizer.pad_token_id if name == "input_ids" else 0
                inputs[name] = pad_sequence(rows, batch_first=True, padding_value=padding)
        return inputs


class VisionLM(SharedLM, _ImageTextLM):
    """A vision model, with an adapter or without."""

    def tokens_of(self, request: Instance) -> int:
        """How many tokens a request has, its images' and those that may be written among them."""
        tokens = super().tokens_of(request)
        if images := _images_of(request):
            context = request.args[0]
            encoding = self.tok_batch_multimodal_encode([context], [images])
            tokens += encoding["input_ids"].shape[1] - len(self.tok_encode(context))
        return tokens


def _images_of(request: Instance) -> list[Any]:
    """The images of a request; a text task's has no third argument at all."""
    return request.args[2]["visual"] if request.args[2:] else []


def _values(
    row: Row, beginning: tuple[int, ...], log_probs: Tensor
) -> Iterator[tuple[int, LogLikelihood]]:
    """The values of a row's answers that have this beginning.

    Args:
        row: the row.
        beginning: what the model has read after the context.
        log_probs: (tokens of an answer, vocabulary).
    """
    greedy = tuple(log_probs.argmax(-1).tolist())
    for place, answer in zip(row.requests, row.answers, strict=True):
        if answer[:-1] == beginning:
            tokens = torch.tensor(answer, device=log_probs.device)
            total = log_probs.gather(1, tokens[:, None]).sum()
            yield place, (float(total), greedy == answer)


def _by_kind(
    requests: Sequence[Instance],
    about_text: Callable[[list[Instance]], list[Any]],
    about_images: Callable[[list[Instance]], list[Any]],
) -> list[Any]:
    """Answer the requests without an image one way and those with some another, in their order."""
    shown = [bool(_images_of(request)) for request in requests]
    text = [
        replace(request, arguments=request.args[:2])  # which is how lm-eval knows them
        for request, is_shown in zip(requests, shown, strict=True)
        if not is_shown
    ]
    images = [request for request, is_shown in zip(requests, shown, strict=True) if is_shown]
    answers = {
        False: iter(about_text(text) if text else ()),
        True: iter(about_images(images) if images else ()),
    }
    return [next(answers[is_shown]) for is_shown in shown]
