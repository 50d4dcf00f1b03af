"""Examples that show an image.

An example holds one token for its image, and the image as the bytes of its file. Decoding it, and
putting as many tokens there as the image takes (576 with LLaVA-1.5; with Qwen-VL and SmolVLM by its
size), is left to the collator: pixels would not fit into memory. What comes out is token for token
what evaluation scores, and the loss is on the answer and EOS only, as with text.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moelora_eval_tasks.images import decode
from moelora_eval_tasks.prompts import IMAGE_PLACEHOLDER, Prompt

from ..processors import image_text
from .examples import IGNORED_LABEL, AnswerCollator, build_example

Build = Callable[[Prompt, Any], dict[str, Any]]


def vision_examples(processor: Any, max_length: int) -> Build:
    """What builds the examples of a vision model.

    Args:
        processor: the base's.
        max_length: tokens in an example without an image, whose context is cut as `build_example`
            does. One with an image is never cut: the image's tokens would go first.

    Returns:
        A function of a rendered row and its image (None, or as it is stored) that gives what
        `build_example` does, the `image`, and the `length` in tokens, the image's included.
    """
    lengths: dict[tuple[int, int], int] = {}  # by size: nothing else counts

    def image_length(image: Any) -> int:
        picture = decode(image)
        if picture.size not in lengths:
            lengths[picture.size] = len(_show(processor, [picture])["input_ids"][0])
        return lengths[picture.size]

    def build(prompt: Prompt, image: Any) -> dict[str, Any]:
        if image is None:
            example = build_example(processor.tokenizer, prompt, max_length)
            return {**example, "image": None, "length": len(example["input_ids"])}
        context = prompt.context.replace(IMAGE_PLACEHOLDER, image_text(processor))
        example = build_example(processor.tokenizer, replace(prompt, context=context), sys.maxsize)
        length = len(example["input_ids"]) - 1 + image_length(image)
        return {**example, "image": image, "length": length}

    return build


@dataclass(frozen=True)
class VisionCollator:
    """Puts images into a batch of examples and pads it on the right, to the longest.

    The processor prepares the images of a batch together, since each architecture batches them in
    its own way (a tensor of images, a list of patches, tiles with a mask of their own).

    Attributes:
        processor: the base model's.
    """

    processor: Any

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """What `AnswerCollator` gives, and the images as the model takes them.

        A batch of texts has none. The labels of an image's tokens are -100.
        """
        pad = AnswerCollator(self.processor.tokenizer.pad_token_id)
        images = [decode(row["image"]) for row in examples if row["image"] is not None]
        if not images:
            return pad(examples)
        shown = _show(self.processor, images, padding=True, return_tensors="pt")
        ids, mask = shown.pop("input_ids"), shown.pop("attention_mask").bool()
        kinds = shown.pop("mm_token_type_ids", None)
        blocks = iter([row[real].tolist() for row, real in zip(ids, mask, strict=True)])
        batch = pad([self._with_image(row, blocks) for row in examples])
        if kinds is not None:  # Qwen-VL counts positions by it: 1 where a token is an image's
            shown["mm_token_type_ids"] = torch.isin(batch["input_ids"], ids[kinds == 1]).long()
        return {**batch, **shown}

    def _with_image(
        self, example: Mapping[str, Any], blocks: Iterator[list[int]]
    ) -> Mapping[str, Any]:
        """The example with the next image's tokens in place of its image token, if it has one."""
        if example["image"] is None:
            return example
        tokens, labels = list(example["input_ids"]), list(example["labels"])
        at, block = tokens.index(self.processor.image_token_id), next(blocks)
        tokens[at : at + 1] = block
        labels[at : at + 1] = [IGNORED_LABEL] * len(block)
        return {**example, "input_ids": tokens, "labels": labels}


def _show(processor: Any, images: list[Any], **options: Any) -> dict[str, Any]:
    """Each image by itself: the tokens it becomes, and the tensors that go with them."""
    texts = [processor.image_token] * len(images)
    return dict(processor(text=texts, images=images, add_special_tokens=False, **options))
