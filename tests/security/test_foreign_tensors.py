"""A file's tensors go into its adapter alone: the base below it stays as it is."""

from __future__ import annotations

import shutil

import pytest
import torch
from native import natively
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from moelora_plugin import MoeLoraConfig, load_adapter
from moelora_plugin.errors import AdapterError

NORM = "model.layers.0.input_layernorm.weight"
# Names that a tensor of the base's could be smuggled in by, and names of nothing.
FOREIGN = {
    "a norm": f"base_model.model.{NORM}",
    "an adapted weight": "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
    "another layer": "base_model.model.model.layers.5.self_attn.q_proj.moelora_A.weight",
    "another part": "base_model.model.model.layers.0.self_attn.q_proj.moelora_extra.other",
}


@pytest.fixture
def with_tensors(saved, tmp_path):
    """The adapter as PEFT alone saves it, with further tensors in its file."""

    def add(tensors):
        folder = tmp_path / "adapter"
        shutil.copytree(saved, folder)
        (folder / "moelora.json").unlink()
        file = folder / "adapter_model.safetensors"
        everything = {**load_file(file), **tensors}
        save_file(everything, file, metadata={"format": "pt"})
        return folder

    return add


def base():
    return tiny_llama(len(tiny_tokenizer()), hidden=16, layers=1)


def under_a_peft_model(folder):
    return PeftModel.from_pretrained(base(), str(folder))


def beside_another(folder):
    config = MoeLoraConfig(num_experts=2, top_k=1, r=2, target_modules=["q_proj"])
    model = get_peft_model(base(), config)
    model.load_adapter(str(folder), "stranger")
    return model


def over_itself(folder):
    config = MoeLoraConfig(num_experts=4, top_k=2, r=2, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base(), config)
    model.load_adapter(str(folder), "default", is_trainable=True)
    return model


def strictly(folder):
    load_adapter(folder, device="cpu")


def by_transformers(folder):
    AutoModelForCausalLM.from_pretrained(str(folder))


LOADERS = [
    under_a_peft_model,
    beside_another,
    over_itself,
    strictly,
    pytest.param(by_transformers, marks=natively),
]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", FOREIGN.values(), ids=FOREIGN)
def test_a_tensor_that_is_not_the_adapters_is_refused(load, name, with_tensors):
    folder = with_tensors({name: torch.zeros(16, 16) if "q_proj" in name else torch.zeros(16)})
    with pytest.raises(AdapterError, match="have no place in the base"):
        load(folder)


@pytest.mark.parametrize("load", [load for load in LOADERS if load is not over_itself])
def test_nor_is_a_whole_base(load, with_tensors):
    def stored_name(name):
        adapted = name.replace(".q_proj.", ".q_proj.base_layer.")
        return f"base_model.model.{adapted.replace('.v_proj.', '.v_proj.base_layer.')}"

    state = {stored_name(name): tensor.clone() for name, tensor in base().state_dict().items()}
    with pytest.raises(AdapterError, match="have no place in the base"):
        load(with_tensors(state))


@pytest.mark.parametrize("load", [under_a_peft_model, beside_another, over_itself])
def test_tensors_of_an_adapter_that_was_saved_beside_go_nowhere(load, with_tensors, saved):
    """PEFT before 0.20 writes those of all adapters into the file of each."""
    own = load_file(saved / "adapter_model.safetensors")
    others = {key.replace(".weight", ".second.weight"): t + 1 for key, t in own.items()}
    others |= {key.replace("q_proj", "o_proj"): t.clone() for key, t in others.items()}
    model = load(with_tensors(others))
    name = "stranger" if load is beside_another else "default"
    loaded = get_peft_model_state_dict(model, adapter_name=name)
    assert loaded.keys() >= own.keys()
    for key, tensor in own.items():
        assert torch.equal(tensor, loaded[key]), key


@pytest.mark.parametrize("strict", [True, False])
def test_a_whole_models_state_is_taken(strict):
    config = MoeLoraConfig(num_experts=2, top_k=1, r=2, target_modules=["q_proj"])
    other, model = (get_peft_model(base(), config) for _ in range(2))
    with torch.no_grad():
        other.get_parameter(f"base_model.model.{NORM}").fill_(0.5)
    model.load_state_dict(other.state_dict(), strict=strict)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_a_part_of_the_base_s_state_is_somebody_s_own():
    model = get_peft_model(base(), MoeLoraConfig(num_experts=2, top_k=1, target_modules=["q_proj"]))
    name = f"base_model.model.{NORM}"
    model.load_state_dict({name: torch.full((16,), 0.5)}, strict=False)
    assert torch.equal(model.get_parameter(name), torch.full((16,), 0.5))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.bool])
@pytest.mark.parametrize("part", ["moelora_A", "moelora_gate"])
def test_numbers_that_are_no_weights_are_refused_by_name(dtype, part, with_tensors):
    name = f"base_model.model.model.layers.0.self_attn.q_proj.{part}.weight"
    folder = with_tensors({name: torch.ones(8 if part == "moelora_A" else 4, 16).to(dtype)})
    with pytest.raises(AdapterError, match=rf"q_proj\.{part}.* is of {dtype}"):
        under_a_peft_model(folder)
