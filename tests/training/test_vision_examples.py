"""Examples of vision models: tokens as evaluation scores them, a loss on the answer alone."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import pytest
import torch
from tiny_vision import VISION_MODELS, picture, tiny_vision

from moelora_eval_tasks.images import decode
from moelora_eval_tasks.prompts import Prompt
from moelora_plugin.processors import image_text
from moelora_plugin.training.data import collator_for
from moelora_plugin.training.examples import AnswerCollator
from moelora_plugin.training.vision import vision_examples

SHOWN = Prompt("<image>\nQuestion: what is it?\nThe correct answer is", (" A", " B"), 1)
TEXT = Prompt("Question: yes or no, which of the two?\nThe correct answer is", (" A", " B"), 0)


def stored(colour: str, width: int = 24, height: int = 20) -> dict[str, Any]:
    """A picture as a row has it."""
    file = BytesIO()
    picture(colour, width, height).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{colour}.png"}


ROWS = ((SHOWN, stored("red", 40, 16)), (TEXT, None), (SHOWN, stored("blue")))


@pytest.fixture(params=VISION_MODELS, scope="module")
def vision(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return tiny_vision(request.param)


def examples(processor: Any) -> list[dict[str, Any]]:
    build = vision_examples(processor, max_length=512)
    return [build(*row) for row in ROWS]


def whole(processor: Any, prompt: Prompt, image: dict[str, Any] | None) -> dict[str, Any]:
    """A prompt and its answer as the processor alone prepares them."""
    text = prompt.context.replace("<image>", image_text(processor)) + prompt.choices[prompt.gold]
    images = None if image is None else [decode(image)]
    return dict(processor(text=[text], images=images, return_tensors="pt"))


def test_tokens_are_those_of_the_processor(vision: tuple[Any, Any]) -> None:
    _, processor = vision
    batch = collator_for(processor)(examples(processor))
    for number, row in enumerate(ROWS):
        real = batch["input_ids"][number][batch["attention_mask"][number].bool()]
        expected = whole(processor, *row)["input_ids"][0]
        assert real.tolist() == [*expected.tolist(), processor.tokenizer.eos_token_id]


def test_the_loss_is_on_the_answer_and_eos(vision: tuple[Any, Any]) -> None:
    _, processor = vision
    batch = collator_for(processor)(examples(processor))
    trained = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert trained == [" B</s>", " A</s>", " B</s>"]
    is_label = batch["labels"] != -100
    assert torch.equal(batch["labels"][is_label], batch["input_ids"][is_label])


def test_the_length_counts_the_images_tokens(vision: tuple[Any, Any]) -> None:
    _, processor = vision
    built = examples(processor)
    batch = collator_for(processor)(built)
    assert [row["length"] for row in built] == batch["attention_mask"].sum(1).tolist()


def test_each_row_has_the_logits_of_what_the_processor_prepares(vision: tuple[Any, Any]) -> None:
    """Pixels and positions go to the right rows, whatever else is in the batch."""
    model, processor = vision
    with torch.no_grad():
        together = model(**collator_for(processor)(examples(processor))).logits
        for row, logits in zip(ROWS, together, strict=True):
            alone = model(**whole(processor, *row)).logits[0]
            # fp32 sums of some hundred products of size 1 in another order.
            torch.testing.assert_close(logits[: len(alone)], alone, atol=2e-4, rtol=1e-4)


def test_a_batch_of_texts_is_that_of_a_language_model(vision: tuple[Any, Any]) -> None:
    _, processor = vision
    rows = [vision_examples(processor, 512)(TEXT, None)] * 2
    batch = collator_for(processor)(rows)
    expected = AnswerCollator(processor.tokenizer.pad_token_id)(rows)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_a_text_is_cut_and_an_image_is_not(vision: tuple[Any, Any]) -> None:
    _, processor = vision
    build = vision_examples(processor, max_length=10)
    text, shown = build(TEXT, None), build(SHOWN, stored("red"))
    assert (text["cut"], text["length"]) == (True, 10)
    assert not shown["cut"]
    assert shown["length"] > 10
