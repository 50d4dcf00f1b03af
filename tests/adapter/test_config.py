"""MoeLoraConfig: what it refuses and how, presets, and the file it is saved to."""

from __future__ import annotations

import json

import pytest
from peft import PeftConfig, get_peft_model
from tiny import tiny_llama
from torch import nn

from moelora_plugin import MoeLoraConfig
from moelora_plugin.config import FORMAT_VERSION
from moelora_plugin.errors import ConfigError, MoeLoraError


def refusal(**keys) -> str:
    with pytest.raises(ConfigError) as caught:
        MoeLoraConfig(**keys)
    assert isinstance(caught.value, MoeLoraError)
    return str(caught.value)


@pytest.mark.parametrize("key", ["r", "num_experts", "top_k"])
@pytest.mark.parametrize("value", [0, -1, True, 2.0, "4", None])
def test_counts_are_whole_numbers_of_at_least_one(key, value):
    assert refusal(**{key: value}) == f"{key}={value!r} must be an integer of at least 1."


def test_top_k_is_at_most_the_number_of_experts():
    assert refusal(num_experts=2, top_k=3) == (
        "top_k=3 is more than num_experts=2; lower top_k or raise num_experts."
    )
    assert MoeLoraConfig(num_experts=3, top_k=3).top_k == 3


@pytest.mark.parametrize("value", [1, 1.5, -0.1, float("nan"), "0.1", None, True])
def test_dropout_is_a_share(value):
    assert refusal(lora_dropout=value) == f"lora_dropout={value!r} must be a number in [0, 1)."


@pytest.mark.parametrize("value", [0, -16, float("nan"), float("inf"), "16", None, True])
def test_alpha_is_positive(value):
    assert refusal(lora_alpha=value) == f"lora_alpha={value!r} must be a positive number."


@pytest.mark.parametrize(
    ("key", "value", "choices"),
    [
        ("bias", "lora_only", "'none', 'all', 'moelora_only'"),
        ("gate_rescale", "root", "'auto', 'none', 'sqrt', 'exact'"),
        ("gate_rescale_scope", "input", "'weights', 'output'"),
    ],
)
def test_choices_are_listed(key, value, choices):
    assert refusal(**{key: value}) == f"{key}={value!r} must be one of {choices}."


def test_auxiliary_losses_map_names_to_coefficients():
    assert refusal(aux_losses=["switch_lb"]) == (
        "aux_losses=['switch_lb'] must map names to coefficients, like {'switch_lb': 0.001}."
    )
    assert MoeLoraConfig(aux_losses={"switch_lb": 0.001}).aux_losses == {"switch_lb": 0.001}


def test_a_file_of_another_format_is_refused():
    message = refusal(format_version=FORMAT_VERSION + 1)
    assert message == (
        f"format_version={FORMAT_VERSION + 1} was written by another release of moelora; this one "
        f"reads {FORMAT_VERSION}: install a matching release."
    )


@pytest.mark.parametrize(("key", "value"), [("layers_to_transform", [0]), ("layers_pattern", "h")])
def test_layer_indexes_need_a_list_of_targets(key, value):
    assert refusal(target_modules=".*q_proj", **{key: value}) == (
        f"{key} needs target_modules as a list of names or 'all-linear', got the string '.*q_proj'."
    )
    for targets in (["q_proj"], "all-linear"):
        assert getattr(MoeLoraConfig(target_modules=targets, **{key: value}), key) == value


def test_an_unknown_key_is_answered_with_the_nearest_and_the_valid_ones():
    message = refusal(num_expert=4)
    assert message.startswith("MoeLoraConfig has no key 'num_expert'; did you mean 'num_experts'")
    assert "valid keys are allocation, allocation_kwargs, auto_mapping, aux_losses, " in message
    assert "did you mean" not in refusal(zzz=1)


@pytest.mark.parametrize(
    ("key", "name", "nearest"),
    [
        ("router", "topp", "Unknown router 'topp'; did you mean 'top_p' or 'topk'?"),
        ("expert", "lorra", "Unknown expert 'lorra'; did you mean 'lora' or 'dora'?"),
        ("allocation", "unifrom", "Unknown allocation 'unifrom'; did you mean 'uniform'?"),
        ("init", "xxxxxx", "Unknown initialization 'xxxxxx'; known are adapters, "),
        ("router", "no_module.Router", "Cannot import router 'no_module.Router': No module named"),
        ("router", "math.Router", "Cannot import router 'math.Router': module 'math' has no"),
    ],
)
def test_an_unknown_method_is_refused_before_the_model_is_touched(key, name, nearest):
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ConfigError) as caught:
        get_peft_model(model, MoeLoraConfig(target_modules=["0"], **{key: name}))
    assert str(caught.value).startswith(nearest)
    assert type(model[0]) is nn.Linear


def test_explicit_values_win_over_a_preset():
    config = MoeLoraConfig.from_preset("gr_moe_lora", r=2, target_modules=["q_proj"])
    assert (config.r, config.num_experts, config.gate_rescale) == (2, 20, "sqrt")
    assert config.target_modules == ["q_proj"]


def test_an_unknown_preset_offers_the_nearest():
    with pytest.raises(ConfigError, match=r"^Unknown preset 'gr_moelora'; did you mean 'gr_moe_lo"):
        MoeLoraConfig.from_preset("gr_moelora")


EVERY_KEY = {
    "r": 3,
    "num_experts": 5,
    "top_k": 2,
    "lora_alpha": 7.5,
    "lora_dropout": 0.25,
    "target_modules": ["v_proj", "q_proj"],
    "exclude_modules": ["lm_head"],
    "layers_to_transform": [1, 3],
    "layers_pattern": "layers",
    "modules_to_save": ["score"],
    "trainable_token_indices": [3, 5],
    "bias": "moelora_only",
    "router": "topk",
    "expert": "lora",
    "allocation": "uniform",
    "init": "kaiming",
    "aux_losses": {},
    "gate_rescale": "exact",
    "gate_rescale_scope": "output",
    "use_rslora": True,
    "task_type": "CAUSAL_LM",
    "inference_mode": False,
    "base_model_name_or_path": "a/b",
    "revision": "main",
}


def test_saved_and_read_again_it_is_the_same(tmp_path):
    config = MoeLoraConfig(**EVERY_KEY)
    sorted_names = {"target_modules": ["q_proj", "v_proj"]}
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "MOELORA"
    assert written["format_version"] == FORMAT_VERSION
    assert written["target_modules"] == ["q_proj", "v_proj"]  # sorted: the file is stable
    assert {**written, **EVERY_KEY, **sorted_names} == written
    for reader in (PeftConfig, MoeLoraConfig):
        read = reader.from_pretrained(tmp_path)
        assert type(read) is MoeLoraConfig
        assert read == config
        assert read.to_dict() == {**config.to_dict(), **EVERY_KEY, **sorted_names}


def test_the_file_is_the_same_every_time(tmp_path):
    """PEFT turns matched names into sets, whose order changes from process to process."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
    config = MoeLoraConfig(target_modules="all-linear", exclude_modules=set(names[:2]))
    model = get_peft_model(tiny_llama(hidden=8, layers=1), config)
    content = model.peft_config["default"].to_dict()
    assert content["target_modules"] == sorted(content["target_modules"])
    assert content["exclude_modules"] == ["k_proj", "q_proj"]
    json.dumps(content)


def test_an_unknown_key_in_a_file_is_an_error(tmp_path):
    MoeLoraConfig(**EVERY_KEY).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_expert": 3}))
    for reader in (PeftConfig, MoeLoraConfig):
        with pytest.raises(ConfigError, match="no key 'num_expert'; did you mean 'num_experts'"):
            reader.from_pretrained(tmp_path)
