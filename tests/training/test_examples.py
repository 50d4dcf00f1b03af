from __future__ import annotations

from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from tiny import tiny_llama, tiny_tokenizer
from tokenizers import processors

from moelora_eval_tasks.catalog import TASKS
from moelora_eval_tasks.prompts import Prompt, render
from moelora_plugin.errors import DataError
from moelora_plugin.training.examples import AnswerCollator, build_example, encode_pair

PROMPT = Prompt("### Input:\nComment: a warm film\n\nThe author's attitude is", (" no", " yes"), 1)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def test_the_answer_and_eos_are_trained_and_nothing_else(tokenizer: Any) -> None:
    example = build_example(tokenizer, PROMPT, max_length=128)
    trained = [token for token in example["labels"] if token != -100]
    assert tokenizer.decode(trained) == " yes</s>"
    assert example["labels"][-len(trained) :] == example["input_ids"][-len(trained) :]
    assert tokenizer.decode(example["input_ids"]) == f"<s>{PROMPT.context} yes</s>"
    assert not example["cut"]


def test_a_long_context_is_cut_from_its_left_behind_bos(tokenizer: Any) -> None:
    whole = build_example(tokenizer, PROMPT, max_length=128)["input_ids"]
    for max_length in range(3, len(whole)):
        example = build_example(tokenizer, PROMPT, max_length)
        assert example["cut"]
        assert example["input_ids"] == [whole[0], *whole[len(whole) - max_length + 1 :]]
        assert example["labels"][-2:] == whole[-2:]
    exact = build_example(tokenizer, PROMPT, max_length=len(whole))
    assert exact["input_ids"] == whole
    assert not exact["cut"]


def test_a_cut_without_bos_keeps_the_last_tokens(tokenizer: Any) -> None:
    plain = tiny_tokenizer()
    plain._tokenizer.post_processor = processors.ByteLevel()
    whole = build_example(plain, PROMPT, max_length=128)["input_ids"]
    assert build_example(plain, PROMPT, max_length=7)["input_ids"] == whole[-7:]


def test_an_answer_is_never_cut(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"raise data\.max_length"):
        build_example(tokenizer, PROMPT, max_length=2)


def test_a_tokenizer_that_ends_every_text_is_refused() -> None:
    ending = tiny_tokenizer()
    ending._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    with pytest.raises(DataError, match="does not keep a prompt's tokens"):
        encode_pair(ending, "a film", " yes")


@pytest.mark.parametrize("adds_bos", [True, False])
def test_tokens_are_those_that_lm_eval_scores(adds_bos: bool) -> None:
    tokenizer = tiny_tokenizer()
    if not adds_bos:
        tokenizer._tokenizer.post_processor = processors.ByteLevel()
    harness = HFLM(pretrained=tiny_llama(vocab_size=len(tokenizer)), tokenizer=tokenizer)
    rows = {
        "sst2": {"sentence": "warm, and  moving ", "label": 1},
        "stsb": {"sentence1": "a film", "sentence2": "a dull film", "label": 3.4},
        "commonsenseqa": {
            "question": "Where does a boat rest?",
            "choices": {"label": list("ABCDE"), "text": ["quay", "oven", "roof", "well", "sky"]},
            "answerKey": "A",
        },
    }
    for name, row in rows.items():
        prompt = render(TASKS[name], row)
        for choice in prompt.choices:
            assert encode_pair(tokenizer, prompt.context, choice) == harness._encode_pair(
                prompt.context, choice
            )
    begins_with_bos = "<s>a film"
    assert encode_pair(tokenizer, begins_with_bos, " yes") == harness._encode_pair(
        begins_with_bos, " yes"
    )


def test_padding_that_equals_eos_hides_no_eos(tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    batch = AnswerCollator(pad_token_id=eos, pad_to_multiple_of=4)(
        [
            {"input_ids": [5, 6, eos], "labels": [-100, 6, eos]},
            {"input_ids": [5, 5, 5, 6, eos], "labels": [-100, -100, -100, 6, eos]},
        ]
    )
    assert batch["input_ids"].shape == (2, 8)
    assert batch["attention_mask"].tolist() == [[1] * 3 + [0] * 5, [1] * 5 + [0] * 3]
    assert batch["labels"][0].tolist() == [-100, 6, eos] + [-100] * 5
    assert batch["input_ids"].dtype == torch.long
