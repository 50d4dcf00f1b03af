"""`adapter_names=["a", "__base__"]`: each sequence of a batch has an adapter of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from preset_cases import ATTENTION, SMALLER, base, config_of, ids_of, randomized

from moelora_plugin import PRESETS, MoeLoraConfig
from moelora_plugin.analysis.routing import routing_statistics
from moelora_plugin.call import routing_ids
from moelora_plugin.errors import ConfigError

NAMES = ["one", "__base__", "two", "one", "three"]
IDS = torch.randint(3, 60, (5, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :2] = MASK[1, :3] = MASK[3, :1] = 0
TASKS = torch.tensor([1, 0, 1, 0, 1])
# In float64; a product over fewer rows may sum in another order.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}
SMALL: dict[str, Any] = {"r": 2, "num_experts": 4, "top_k": 2, "lora_dropout": 0.0}


def config(preset: str) -> MoeLoraConfig:
    targets = PRESETS[preset].overrides.get("target_modules", ATTENTION)
    return config_of(preset, **{"target_modules": targets, **SMALLER.get(preset, {})})


def three(one: MoeLoraConfig, two: MoeLoraConfig, three: MoeLoraConfig) -> PeftModel:
    """A model with three adapters, of which the first is active."""
    model = get_peft_model(base(), one, "one")
    model.add_adapter("two", two)
    model.add_adapter("three", three)
    model.double()
    for seed, name in enumerate(("one", "two", "three")):
        randomized(model, name, seed)
    return model.eval()


def answers(model: PeftModel, preset: str | None, rows: list[int] | slice, **keys: Any):
    ids = dict.fromkeys(ids_of(preset) if preset else {}, TASKS[rows])
    with torch.no_grad(), routing_ids(model, **ids):
        output = model(input_ids=IDS[rows], attention_mask=MASK[rows], use_cache=False, **keys)
    return output.logits


def expected(model: PeftModel, preset: str | None) -> torch.Tensor:
    """Each adapter alone, on its own rows."""
    result = None
    for name in dict.fromkeys(NAMES):
        rows = [row for row, other in enumerate(NAMES) if other == name]
        if name == "__base__":
            with model.disable_adapter():
                found = answers(model, preset, rows)
        else:
            model.set_adapter(name)
            found = answers(model, preset, rows)
        result = found.new_empty(len(NAMES), *found.shape[1:]) if result is None else result
        result[rows] = found
    model.set_adapter("two")
    return result


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_each_sequence_is_answered_by_its_own_adapter(preset):
    model = three(config(preset), config(preset), MoeLoraConfig(**SMALL, target_modules=["q_proj"]))
    whole = expected(model, preset)
    assert not torch.allclose(whole[0], whole[3])  # adapters do something
    found = answers(model, preset, slice(None), adapter_names=NAMES)
    torch.testing.assert_close(found, whole, **CLOSE)
    alone = answers(model, preset, slice(None), adapter_names=["two"] * 5)
    torch.testing.assert_close(alone, answers(model, preset, slice(None)), **CLOSE)


SITES = {
    "linear": {"target_modules": ATTENTION, "router_input": "sequence"},
    "shared": {"target_modules": ATTENTION, "site_kwargs": {"share": [["q_proj", "k_proj"]]}},
    "block": {
        "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"],
        "site": "block",
        "router_input": "prompt",
    },
    "layer": {"target_modules": ATTENTION, "site": "layer", "router_input": "prompt"},
    "model": {"target_modules": ATTENTION, "site": "model", "router": "softmax"},
}


def test_adapters_of_different_sites_share_a_batch():
    for others in (("linear", "block", "layer"), ("model", "shared", "block")):
        model = three(*(MoeLoraConfig(**SMALL, **SITES[site]) for site in others))
        whole = expected(model, None)
        found = answers(model, None, slice(None), adapter_names=NAMES)
        torch.testing.assert_close(found, whole, **CLOSE)
        torch.testing.assert_close(expected(model, None), whole, **CLOSE)  # nothing is left behind


@pytest.mark.parametrize("site", [site for site in SITES if site != "model"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_answers_each_with_its_own(site, beams):
    model = three(*[MoeLoraConfig(**SMALL, **SITES[site])] * 3)
    keys = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    found = model.generate(input_ids=IDS, attention_mask=MASK, adapter_names=NAMES, **keys)
    for row, name in enumerate(NAMES):
        rows = {"input_ids": IDS[row : row + 1], "attention_mask": MASK[row : row + 1]}
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(**rows, **keys)
        else:
            model.set_adapter(name)
            alone = model.generate(**rows, **keys)
        assert found[row].tolist() == alone[0].tolist()


def test_a_causal_model_s_own_forward_finds_a_wrong_number_at_its_layers():
    keys = {**SMALL, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"}
    model = get_peft_model(base(), MoeLoraConfig(**keys), "one").eval()
    for names in (["one", "one"], ["one"], ["one"] * 10):
        with pytest.raises(ConfigError, match=f"each of {len(names)} sequences, and a layer got 5"):
            answers(model, None, slice(None), adapter_names=names)
    found = answers(model, None, slice(None), adapter_names=["one"] * 5)
    torch.testing.assert_close(found, answers(model, None, slice(None)))


def test_statistics_count_each_adapter_s_own_rows():
    model = three(*[MoeLoraConfig(**SMALL, target_modules=ATTENTION)] * 3)
    for name in ("one", "two"):
        rows = [row for row, other in enumerate(NAMES) if other == name]
        with routing_statistics(model, name) as mixed:
            answers(model, None, slice(None), adapter_names=NAMES)
        model.set_adapter(name)
        with routing_statistics(model, name) as alone:
            answers(model, None, rows)
        assert mixed.to_dict().keys() == alone.to_dict().keys()
        for layer, found in mixed.to_dict().items():
            for key, value in found.items():
                assert value == pytest.approx(alone.to_dict()[layer][key])


def test_whole_modules_and_lora_s_own_words():
    keys = {**SMALL, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = get_peft_model(base(), MoeLoraConfig(**keys), "one").double()
    model.add_adapter("two", MoeLoraConfig(**keys))
    model.double().eval()
    names = ["one", "two", "__base__", "one", "two"]
    for seed, name in enumerate(("one", "two")):
        randomized(model, name, seed)
        head = model.get_base_model().lm_head.modules_to_save[name].weight
        torch.nn.init.normal_(head)
    found = answers(model, None, slice(None), adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = answers(model, None, [row])
        else:
            model.set_adapter(name)
            alone = answers(model, None, [row])
        torch.testing.assert_close(found[row : row + 1], alone, **CLOSE)


WRONG = [
    ({"adapter_names": ["one", "two"]}, "2 sequences, and the batch has 5"),
    ({"adapter_names": [*NAMES, *NAMES]}, "10 sequences, and the batch has 5"),
    ({"adapter_names": ["one", "four", *NAMES[:3]]}, "'four', and the model's adapters are 'one'"),
    ({"adapter_names": "one"}, "must be a list"),
    ({"adapter_names": []}, "must be a list"),
]


@pytest.mark.parametrize(("keys", "message"), WRONG)
def test_what_cannot_be_mixed_is_refused(keys, message):
    model = three(*[MoeLoraConfig(**SMALL, target_modules=ATTENTION)] * 3)
    before = answers(model, None, slice(None))
    with pytest.raises(ConfigError, match=message):
        answers(model, None, slice(None), **keys)
    assert torch.equal(answers(model, None, slice(None)), before)


def test_neither_training_nor_merged_models_mix():
    one = {**SMALL, "num_experts": 1, "top_k": 1, "target_modules": ATTENTION}
    model = three(*[MoeLoraConfig(**one)] * 3)
    with pytest.raises(ConfigError, match=r"training mode; call model.eval\(\)"):
        answers(model.train(), None, slice(None), adapter_names=NAMES)
    model.eval().merge_adapter()
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        answers(model, None, slice(None), adapter_names=NAMES)
    model.unmerge_adapter()
    with pytest.raises(ConfigError, match="each of 2 sequences, and the batch has 5"):
        model.generate(input_ids=IDS, adapter_names=["one", "two"], max_new_tokens=1)


def test_one_expert_mixes_as_lora_does():
    """PEFT's own mixed batches, to the bit of float64's rounding."""
    keys = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ATTENTION}
    found = []
    for one in (LoraConfig(**keys), MoeLoraConfig(**keys, num_experts=1, top_k=1)):
        torch.manual_seed(0)
        model = get_peft_model(base(), one, "one").double()
        model.add_adapter("two", one)
        model.double().eval()
        for name in ("one", "two"):
            for key, parameter in sorted(model.named_parameters()):
                if f"_A.{name}" in key or f"_B.{name}" in key:
                    generator = torch.Generator().manual_seed(len(key.partition("lora_")[0]))
                    generator.manual_seed(parameter.numel() + (name == "two"))
                    parameter.data = 0.3 * torch.randn(
                        parameter.shape, generator=generator, dtype=torch.float64
                    )
        with torch.no_grad():
            names = ["one", "two", *NAMES[:3]]
            found.append(model(input_ids=IDS, use_cache=False, adapter_names=names).logits)
    torch.testing.assert_close(*found, **CLOSE)
