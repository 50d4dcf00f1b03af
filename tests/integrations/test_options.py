"""What every host's config file becomes."""

from __future__ import annotations

import pytest
import yaml
from tiny import tiny_llama

from moelora_plugin import MoeLoraConfig
from moelora_plugin.errors import ConfigError
from moelora_plugin.integrations.init import write_config
from moelora_plugin.integrations.options import (
    adapter_config,
    option_types,
    option_value,
    preset_fields,
    refuse_disagreement,
)
from moelora_plugin.presets import PRESETS


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
        ({"preset": "mola"}, {}, "remove the key, or the preset that implies it"),
    ],
)
def test_what_disagrees_is_refused(options, words, message):
    # num_experts 8 alone would be less than top_k's default 10: the preset's is not stated.
    words = {**words, **({"top_k": 2} if "num_experts" in options else {})}
    with pytest.raises(ConfigError, match=message):
        refuse_disagreement(options, words, SAVED, "out", lambda field: f"key_{field}")


def test_a_key_that_the_file_leaves_out_stands_for_its_default():
    saved = {key: value for key, value in SAVED.items() if key != "bias"}
    refuse_disagreement({}, {"bias": "none"}, saved, "out", str)
    with pytest.raises(ConfigError, match=r"bias is 'moelora_only', but .* trained with 'none'"):
        refuse_disagreement({}, {"bias": "moelora_only"}, saved, "out", str)


SAVED_HALF = {**SAVED, "layers_to_transform": [1]}
FULL = [f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qv"]


@pytest.mark.parametrize(
    ("saved", "targets"),
    [
        (SAVED, ["v_proj", "q_proj"]),
        (SAVED, ["self_attn.v_proj", "self_attn.q_proj"]),
        (SAVED, FULL),
        (SAVED, r".*\.(q|v)_proj"),
        (SAVED, ["q_proj", "v_proj", "no_such_module"]),  # as a preset's list may have
        (SAVED_HALF, ["q_proj", "v_proj"]),
        ({**SAVED, "target_modules": FULL}, ["q_proj", "v_proj"]),
        ({**SAVED, "target_modules": "all-linear"}, "all-linear"),
    ],
)
def test_target_modules_agree_where_they_find_the_same(saved, targets):
    refuse_disagreement({}, {"target_modules": targets}, saved, "out", str, tiny_llama())


@pytest.mark.parametrize("saved", [SAVED, SAVED_HALF])
@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj"],
        ["q_proj", "v_proj", "down_proj"],
        "all-linear",
        ["all-linear"],
        r".*\.[qvk]_proj",
        r".*layers\.0.*\.(q|v)_proj",
    ],
)
def test_target_modules_that_find_others_are_refused_with_both(saved, targets):
    with pytest.raises(ConfigError, match=r"^key is .*out was trained with \['q_proj', 'v_proj'\]"):
        refuse_disagreement(
            {}, {"target_modules": targets}, saved, "out", lambda _: "key", tiny_llama()
        )


def test_the_options_of_a_host_are_the_fields_it_has_no_word_for():
    found = option_types({"r", "target_modules"})
    assert (found["preset"], found["num_experts"]) == (str, int)
    assert not {"r", "target_modules", "format_version", "peft_type", "revision"} & set(found)


MAPPINGS = sorted(
    name for name, hint in option_types(()).items() if getattr(hint, "__origin__", None) is dict
)


def test_every_mapping_of_the_configuration_is_among_them():
    assert {"aux_losses", "router_modifiers", "router_kwargs", "expert_kwargs"} <= set(MAPPINGS)


class HostMapping(dict):
    """A host's own kind of mapping (axolotl's DictDefault)."""


@pytest.mark.parametrize("name", MAPPINGS)
def test_a_mapping_comes_as_yaml_as_a_host_s_own_kind_or_as_json(name):
    expected = {"a": 0.001, "b": {"c": [1, "2", 0.5], "d": None}, "e": "1x", "f": True}
    for given in (
        HostMapping(expected, a="1e-3", b=HostMapping(c=(1, "2", ".5"), d=None)),
        '{"a": 1e-3, "b": {"c": [1, "2", "0.5"], "d": null}, "e": "1x", "f": true}',
    ):
        found = option_value(name, given)
        assert found == expected
        assert type(found) is type(found["b"]) is dict
        assert isinstance(found["a"], float)


@pytest.mark.parametrize("name", MAPPINGS)
def test_text_that_is_no_json_is_refused_by_the_host_s_key(name):
    with pytest.raises(ConfigError, match=f"^host_{name}='a=1' must be a mapping; .*JSON"):
        option_value(name, "a=1", f"host_{name}")


def test_plain_values_and_names_stay_as_they_are():
    for name, value in {"router": "1e-3", "num_experts": 8, "target_modules": ["1.5"]}.items():
        assert option_value(name, value) == value
    assert option_value("trainable_token_indices", {"embed": [1, 2]}) == {"embed": [1, 2]}
    assert option_value("no_such_field", "1e-3") == "1e-3"


def test_a_mapping_joins_the_preset_s_and_null_takes_a_key_out():
    config = adapter_config(
        {"preset": "mixlora_switch", "aux_losses": {"z": "2e-3", "switch_lb": None}}
    )
    assert config.aux_losses == {"z": 0.002}
    assert preset_fields({"preset": "mixlora_switch"})["site"] == config.site == "block"
    assert preset_fields({})["num_experts"] == 20
    with pytest.raises(ConfigError, match="did you mean 'mixlora'"):
        preset_fields({"preset": "mixlorra"})


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("name", PRESETS)
def test_init_writes_the_preset_s_target_modules(name, tmp_path):
    if PRESETS[name].needs:
        with pytest.raises(ConfigError, match=rf"^Preset '{name}' needs .* which only you can say"):
            write_config("axolotl", preset=name, out=tmp_path / "axolotl")
        return
    expected = PRESETS[name].overrides.get("target_modules", SEVEN[:4])
    expected = SEVEN if expected == "all-linear" else expected
    write_config("axolotl", preset=name, out=tmp_path / "axolotl")
    write_config("llamafactory", preset=name, out=tmp_path / "llamafactory")
    axolotl = yaml.safe_load((tmp_path / "axolotl" / "axolotl.yaml").read_text())
    llamafactory = yaml.safe_load((tmp_path / "llamafactory" / "llamafactory.yaml").read_text())
    assert axolotl["lora_target_modules"] == expected
    assert llamafactory["lora_target"].split(",") == expected
