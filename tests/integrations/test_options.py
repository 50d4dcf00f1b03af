"""What every host's config file becomes."""

from __future__ import annotations

import pytest

from moelora_plugin import MoeLoraConfig
from moelora_plugin.errors import ConfigError
from moelora_plugin.integrations.options import (
    adapter_config,
    option_types,
    refuse_disagreement,
)


def test_the_preset_first_then_the_host_s_words_then_our_options():
    config = adapter_config(
        {"preset": "gr_moe_lora", "num_experts": 8, "top_k": 2, "init": None},
        {"r": 3, "lora_alpha": None},
    )
    assert (config.num_experts, config.top_k, config.gate_rescale) == (8, 2, "sqrt")
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 16, 0.05)
    assert (config.init, config.task_type) == ("kaiming", "CAUSAL_LM")
    assert adapter_config({}).num_experts == 20
    assert adapter_config({}, {"task_type": "TOKEN_CLS"}).task_type == "TOKEN_CLS"


def test_an_unknown_key_and_an_unknown_preset_offer_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'num_experts'"):
        adapter_config({"num_expert": 8})
    with pytest.raises(ConfigError, match="did you mean 'gr_moe_lora'"):
        adapter_config({"preset": "gr_moelora"})


SAVED = MoeLoraConfig(
    num_experts=4, top_k=2, r=3, target_modules=["q_proj", "v_proj"], gate_rescale="sqrt"
).to_dict()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, {}),
        ({"num_experts": 4, "top_k": 2}, {"r": 3, "lora_alpha": 16}),
        ({"num_experts": None}, {"r": None}),
        ({"gate_rescale": "auto"}, {"target_modules": ["v_proj", "q_proj"]}),
        ({}, {"target_modules": "all-linear"}),
    ],
)
def test_what_agrees_with_the_saved_adapter_passes(options, words):
    refuse_disagreement(options, words, SAVED, "out", str)


@pytest.mark.parametrize(
    ("options", "words", "message"),
    [
        ({"num_experts": 8}, {}, "key_num_experts is 8, .* in out was trained with 4 and keeps"),
        ({}, {"r": 8}, "key_r is 8, but the adapter in out was trained with 3 and keeps it"),
        ({"gate_rescale": "none"}, {}, "key_gate_rescale is 'none', .* trained with 'sqrt'"),
        ({"preset": "gr_moe_lora"}, {}, "is 20, .* remove the key, or the preset that implies it"),
        ({}, {"target_modules": ["q_proj"]}, r"is \['q_proj'\], .* \['q_proj', 'v_proj'\]"),
    ],
)
def test_what_disagrees_is_refused(options, words, message):
    # num_experts 8 alone would be less than top_k's default 10: the preset's is not stated.
    words = {**words, **({"top_k": 2} if "num_experts" in options else {})}
    with pytest.raises(ConfigError, match=message):
        refuse_disagreement(options, words, SAVED, "out", lambda field: f"key_{field}")


def test_the_options_of_a_host_are_the_fields_it_has_no_word_for():
    found = option_types({"r", "target_modules"})
    assert (found["preset"], found["num_experts"]) == (str, int)
    assert not {"r", "target_modules", "format_version", "peft_type", "revision"} & set(found)
