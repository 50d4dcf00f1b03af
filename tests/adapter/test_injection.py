"""PEFT's low-level ways of adding an adapter, and what a mixture has no answer to."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import (
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting
from preset_cases import ATTENTION, base, randomized, toy_batch

from moelora_plugin import MoeLoraConfig
from moelora_plugin.errors import ConfigError

SMALL = {"r": 2, "num_experts": 4, "top_k": 2, "lora_dropout": 0.0}
BATCH = {key: value for key, value in toy_batch().items() if key != "labels"}
SITES = {
    "linear": {"target_modules": ATTENTION},
    "shared": {"target_modules": ATTENTION, "site_kwargs": {"share": [["q_proj", "k_proj"]]}},
    "block": {"target_modules": ["gate_proj", "up_proj", "down_proj"], "site": "block"},
    "layer": {"target_modules": ATTENTION, "site": "layer"},
    "model": {"target_modules": ATTENTION, "site": "model", "router": "softmax"},
}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**BATCH, use_cache=False).logits


@pytest.mark.parametrize(
    ("site", "is_compiled", "low_cpu_mem_usage"),
    [*itertools.product(SITES, [False], [False, True]), ("linear", True, True)],
)
def test_the_keys_of_a_state_dict_say_which_modules(site, is_compiled, low_cpu_mem_usage):
    trained = randomized(get_peft_model(base(), MoeLoraConfig(**SMALL, **SITES[site])))
    state = {
        key.removeprefix("base_model.model."): value
        for key, value in get_peft_model_state_dict(trained).items()
    }
    # The configuration need not name the same ones; PEFT says so where it does not.
    targets = SITES[site]["target_modules"] if site == "block" else [*ATTENTION, "up_proj"]
    config = MoeLoraConfig(**{**SMALL, **SITES[site], "target_modules": targets})
    inner = base()
    model = torch.compile(inner, backend="eager") if is_compiled else inner
    if targets == SITES[site]["target_modules"]:
        inject_adapter_in_model(
            config, model, state_dict=state, low_cpu_mem_usage=low_cpu_mem_usage
        )
    else:
        with pytest.warns(RuntimeWarning, match="additional target modules"):
            inject_adapter_in_model(
                config, model, state_dict=state, low_cpu_mem_usage=low_cpu_mem_usage
            )
    found = set_peft_model_state_dict(inner, state, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not found.unexpected_keys
    assert not [key for key in found.missing_keys if "moelora_" in key]
    assert torch.equal(logits(model), logits(trained))


def test_weighted_sums_of_mixtures_are_refused():
    config = MoeLoraConfig(**SMALL, target_modules=ATTENTION)
    model = get_peft_model(base(), config)
    model.add_adapter("other", config)
    with pytest.raises(ConfigError, match=r"add_weighted_adapter .* base_model.set_adapter"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    assert set(model.peft_config) == {"default", "other"}


def test_a_pattern_for_layers_needs_layers():
    keys = {**SMALL, "target_modules": ATTENTION, "layers_pattern": "layers"}
    with pytest.raises(ConfigError, match=r"layers_pattern='layers' .*layers_to_transform"):
        get_peft_model(base(), MoeLoraConfig(**keys))
    get_peft_model(base(), MoeLoraConfig(**keys, layers_to_transform=[0]))


@pytest.mark.parametrize("site", ["linear", "block"])
def test_input_casts_can_be_switched_as_elsewhere_in_peft(site):
    model = randomized(get_peft_model(base(), MoeLoraConfig(**SMALL, **SITES[site])))
    expected = logits(model)
    with disable_input_dtype_casting(model):
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)
