"""Each layer goes by the mask of the tokens that it sees: the encoder's, the decoder's, an image's.

The sequences here have the same length in every stream, so that counting tokens tells nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapted_llama import randomize
from peft import PeftModel, get_peft_model
from tiny import enable_checkpointing
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from moelora_plugin import MoeLoraConfig, routing_statistics
from moelora_plugin.errors import ConfigError
from moelora_plugin.model import moelora_layers

VOCABULARY, WIDTH, HIDDEN = 40, 6, 16
# fp64: a few hundred roundings, in another order where another shape takes another kernel.
NEAR = {"rtol": 0, "atol": 1e-9}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=4, d_ff=24, num_layers=2,
            num_heads=4, dropout_rate=0.0, feed_forward_proj="gated-gelu",
            **{**TOKENS, "decoder_start_token_id": 0},
        )
    )  # fmt: skip


def bart() -> nn.Module:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY, d_model=HIDDEN, encoder_layers=1, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=24,
            decoder_ffn_dim=24, max_position_embeddings=32, dropout=0.0, **TOKENS,
            forced_eos_token_id=None,
        )
    )  # fmt: skip


def two_berts() -> nn.Module:
    halves = [
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=4,
            intermediate_size=24, max_position_embeddings=32, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        for _ in range(2)
    ]  # fmt: skip
    config = EncoderDecoderConfig.from_encoder_decoder_configs(*halves, **TOKENS)
    return EncoderDecoderModel(config)


MODELS: dict[str, Callable[[], nn.Module]] = {"t5": t5, "bart": bart, "two_berts": two_berts}
ALL = pytest.mark.parametrize("name", MODELS)
# Last parts of names of linears that read the encoder's states, under the module that does.
CROSS = ("EncDecAttention", "encoder_attn", "crossattention")
KEYS = ("k", "v", "k_proj", "v_proj", "key", "value")


# transformers' note on a loss that was computed elsewhere, years ago.
pytestmark = pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")


def stream_of(name: str) -> str:
    parts = name.split(".")
    if "decoder" not in parts:
        return "encoder" if "encoder" in parts else "decoder"  # the head
    is_cross = any(part in CROSS for part in parts) and parts[-1] in KEYS
    return "encoder" if is_cross else "decoder"


def adapted(name: str, **keys: Any) -> PeftModel:
    torch.manual_seed(0)
    options = {"target_modules": "all-linear", "num_experts": 3, "top_k": 2, "r": 2, **keys}
    if name == "two_berts":  # a pooler and a head see one token of a sequence, in generation
        options["exclude_modules"] = ["pooler.dense", "transform.dense"]
    model = get_peft_model(MODELS[name](), MoeLoraConfig(**options))
    randomize(model)
    return model.double().eval()


def batch(lengths: list[int], answers: list[int], left: bool = False) -> dict[str, torch.Tensor]:
    """Questions and answers, both padded to WIDTH (questions, if asked, on the left)."""
    generator = torch.Generator().manual_seed(7)
    ids, answer = torch.randint(3, VOCABULARY, (2, len(lengths), WIDTH), generator=generator)
    place = torch.arange(WIDTH)
    mask = torch.stack([place < n for n in lengths])
    mask = mask.flip(1) if left else mask
    decoder_mask = torch.stack([place < n for n in answers])
    return {
        "input_ids": ids.masked_fill(~mask, 0),
        "attention_mask": mask.long(),
        "decoder_input_ids": answer.masked_fill(~decoder_mask, 0),
        "decoder_attention_mask": decoder_mask.long(),
    }


@ALL
@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "recomputed"])
def test_each_layer_counts_the_tokens_that_it_sees(name: str, checkpoint: bool) -> None:
    model = adapted(name, aux_losses={"switch_lb": 0.01})
    inputs = batch([6, 2, 3], [1, 6, 4])
    labels = inputs["decoder_input_ids"].masked_fill(inputs["decoder_attention_mask"] == 0, -100)
    if checkpoint:
        enable_checkpointing(model.get_base_model())
    with routing_statistics(model.train()) as statistics:
        model(**inputs, labels=labels).loss.backward()
    expected = {"encoder": 6 + 2 + 3, "decoder": 1 + 6 + 4}
    found = {layer: counts.tokens for layer, counts in statistics.layers.items()}
    assert found == {layer: expected[stream_of(layer)] for layer in found}
    assert {stream_of(layer) for layer in found} == {"encoder", "decoder"}
    assert len(found) == len(moelora_layers(model))


@ALL
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("routed", ["sequence", "prompt"])
def test_a_padded_batch_gives_what_each_sequence_gives_alone(
    name: str, left: bool, routed: str
) -> None:
    if left and name != "t5":
        pytest.skip("absolute positions: padding on the left is another question")
    model = adapted(name, router_input=routed)
    lengths, answers = [6, 2, 3], [1, 6, 4]
    inputs = batch(lengths, answers, left)
    with torch.no_grad():
        together = model(**inputs).logits
        for row, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
            question = inputs["input_ids"][row : row + 1]
            question = question[:, -length:] if left else question[:, :length]
            reply = inputs["decoder_input_ids"][row : row + 1, :answer]
            alone = model(input_ids=question, decoder_input_ids=reply).logits[0]
            torch.testing.assert_close(together[row, :answer], alone, **NEAR)


@ALL
@pytest.mark.parametrize("routed", ["sequence", "prompt"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_sees_the_encoder_s_padding(name: str, routed: str, use_cache: bool) -> None:
    """`generate` calls the encoder by itself, past the model."""
    model, lengths = adapted(name, router_input=routed), [6, 2, 3]
    inputs = {k: v for k, v in batch(lengths, [1, 1, 1]).items() if "decoder" not in k}
    options = {
        "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "use_cache": use_cache,
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    together = torch.stack(model.generate(**inputs, **options).logits, 1)
    for row, length in enumerate(lengths):
        question = inputs["input_ids"][row : row + 1, :length]
        mask = torch.ones_like(question)
        out = model.generate(input_ids=question, attention_mask=mask, **options)
        # generate hands out logits in fp32.
        torch.testing.assert_close(
            together[row], torch.stack(out.logits, 1)[0], rtol=1e-6, atol=1e-6
        )


@ALL
def test_generation_continues_as_training_has_it(name: str) -> None:
    """The decoder's prompt is what stands before the first label, one position on."""
    model = adapted(name, router_input="prompt")
    inputs = {k: v for k, v in batch([6, 2, 3], [1, 1, 1]).items() if "decoder" not in k}
    out = model.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    start, answer = out.sequences[:, :-1], out.sequences[:, 1:].contiguous()
    with torch.no_grad():
        whole = model(**inputs, decoder_input_ids=start, labels=answer).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), whole.float(), rtol=1e-6, atol=1e-6)


@ALL
def test_assisted_decoding_decides_by_what_the_decoder_starts_with(name: str) -> None:
    model = adapted(name, router_input="sequence")
    inputs = {k: v[:1] for k, v in batch([6], [1]).items() if "decoder" not in k}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    plain = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, prompt_lookup_num_tokens=2), plain)
    with pytest.raises(ConfigError, match="prompt_lookup_num_tokens"):
        model.generate(
            **inputs, **options, prompt_lookup_num_tokens=2, decoder_input_ids=plain[:, :2]
        )


def test_a_decision_for_the_whole_model_is_the_decoder_s() -> None:
    model = adapted("bart", site="model", target_modules=r".*decoder.*fc1")
    with torch.no_grad():
        assert model(**batch([6, 2], [1, 6]), use_cache=False).logits.isfinite().all()
    everywhere = adapted("bart", site="model")
    with pytest.raises(ConfigError, match="site='model' decides about the tokens"):
        everywhere(**batch([6, 2], [1, 6]), use_cache=False)


def test_sound_has_no_padding_of_the_text() -> None:
    """Whisper: the encoder reads features, as many positions as the answer has tokens."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=VOCABULARY, d_model=HIDDEN, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=24,
        decoder_ffn_dim=24, num_mel_bins=4, max_source_positions=WIDTH, max_target_positions=32,
        **TOKENS,
    )  # fmt: skip
    model = get_peft_model(
        WhisperForConditionalGeneration(config),
        MoeLoraConfig(target_modules="all-linear", num_experts=2, top_k=1, r=2),
    )
    answer = batch([6, 6], [2, 5])
    labels = answer["decoder_input_ids"]
    features = torch.randn(2, 4, 2 * WIDTH)
    with routing_statistics(model.train()) as statistics:
        model(
            input_features=features,
            decoder_input_ids=labels,
            decoder_attention_mask=answer["decoder_attention_mask"],
            labels=labels,
        )
    found = {layer: counts.tokens for layer, counts in statistics.layers.items()}
    expected = {"encoder": 2 * WIDTH, "decoder": 2 + 5}
    assert found == {layer: expected[stream_of(layer)] for layer in found}


def test_a_tower_of_text_beside_one_of_images() -> None:
    """CLIP: as many patches as tokens."""
    torch.manual_seed(0)
    half = {
        "hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }  # fmt: skip
    config = CLIPConfig(
        text_config={**half, "vocab_size": VOCABULARY, "max_position_embeddings": 8, **TOKENS},
        vision_config={**half, "image_size": 4, "patch_size": 2},
        projection_dim=8,
    )
    model = get_peft_model(
        CLIPModel(config), MoeLoraConfig(target_modules=["q_proj"], num_experts=2, top_k=1, r=2)
    )
    place = torch.arange(5)
    mask = torch.stack([place < 3, place < 5]).long()
    ids = torch.randint(3, VOCABULARY, (2, 5)).masked_fill(mask == 0, 2)
    with routing_statistics(model) as statistics, torch.no_grad():
        model(input_ids=ids, attention_mask=mask, pixel_values=torch.randn(2, 3, 4, 4))
    found = {
        tower: {counts.tokens for name, counts in statistics.layers.items() if tower in name}
        for tower in ("text_model", "vision_model")
    }
    assert found == {"text_model": {3 + 5}, "vision_model": {2 * 5}}
