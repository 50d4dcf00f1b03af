"""What PEFT offers around an adapter, on a mixture: targets, files, several adapters."""

from __future__ import annotations

import json

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors import safe_open
from tiny import tiny_llama
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from moelora_plugin import MoeLoraConfig, build_optimizer
from moelora_plugin.errors import ConfigError
from moelora_plugin.layers import MoeLoraLinear
from moelora_plugin.model import moelora_layers

IDS = torch.arange(3, 27).view(2, 12)


def config_for(**keys) -> MoeLoraConfig:
    defaults = {"r": 2, "num_experts": 3, "top_k": 2, "lora_dropout": 0.0}
    return MoeLoraConfig(**{"target_modules": ["q_proj", "v_proj"], **defaults, **keys})


def base():
    return tiny_llama(hidden=16)


def randomise(model, seed: int = 1, adapter: str = "default"):
    generator = torch.Generator().manual_seed(seed)
    for layer in moelora_layers(model).values():
        if adapter in layer.moelora_B:
            b = layer.moelora_B[adapter].weight
            b.data.copy_(torch.randn(b.shape, generator=generator))
    return model


def adapted(seed: int = 1, **keys) -> PeftModel:
    return randomise(get_peft_model(base(), config_for(**keys)), seed).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def adapted_names(model) -> set[str]:
    return {name.partition("model.layers.")[2] for name in moelora_layers(model)}


def trainable_names(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


# Which modules.

ATTENTION = {"self_attn.q_proj", "self_attn.v_proj"}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {f"{i}.{name}" for i in (0, 1) for name in ATTENTION}),
        ({"target_modules": None}, {f"{i}.{name}" for i in (0, 1) for name in ATTENTION}),
        ({"target_modules": r".*\.1\..*(q|down)_proj"}, {"1.self_attn.q_proj", "1.mlp.down_proj"}),
        ({"layers_to_transform": [1]}, {f"1.{name}" for name in ATTENTION}),
        (
            {"layers_to_transform": 0, "layers_pattern": "layers"},
            {f"0.{name}" for name in ATTENTION},
        ),
        ({"exclude_modules": ["v_proj"]}, {"0.self_attn.q_proj", "1.self_attn.q_proj"}),
        ({"exclude_modules": r".*\.0\..*"}, {f"1.{name}" for name in ATTENTION}),
    ],
    ids=["list", "default", "regex", "layers", "pattern", "exclude list", "exclude regex"],
)
def test_target_modules(keys, expected):
    assert adapted_names(adapted(**keys)) == expected


def test_all_linear_leaves_the_head_out():
    model = adapted(target_modules="all-linear", exclude_modules=["o_proj"])
    names = {name.rpartition(".")[2] for name in adapted_names(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
    assert type(model.base_model.model.lm_head) is nn.Linear


def test_targets_that_match_nothing_are_answered_with_the_linears():
    for targets in (["query"], ".*query.*"):
        model = base()
        with pytest.raises(ConfigError) as caught:
            get_peft_model(model, config_for(target_modules=targets))
        assert str(caught.value) == (
            f"target_modules={targets!r} matches no module; the model's linear modules are "
            "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj."
        )
        assert not moelora_layers(model)


def test_an_unknown_architecture_needs_targets():
    with pytest.raises(
        ConfigError, match=r"no default for model type.*set target_modules to some of 0,"
    ):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), config_for(target_modules=None))


# Files.


def test_the_names_of_the_tensors_in_the_file(tmp_path):
    adapted(target_modules=["q_proj"], layers_to_transform=[0]).save_pretrained(tmp_path)
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_tensor(key).shape) for key in file.keys()}  # noqa: SIM118
    assert shapes == {
        f"{layer}.moelora_A.weight": (6, 16),
        f"{layer}.moelora_B.weight": (16, 6),
        f"{layer}.moelora_gate.weight": (3, 16),
    }


def test_auto_model_finds_base_and_adapter(tmp_path):
    plain = base()
    plain.save_pretrained(tmp_path / "base")
    model = get_peft_model(type(plain).from_pretrained(tmp_path / "base"), config_for())
    randomise(model).eval().save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert moelora_layers(loaded)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_freezes_the_adapter_unless_it_is_to_train_on(low_cpu_mem_usage, tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    options = {"low_cpu_mem_usage": low_cpu_mem_usage}
    loaded = PeftModel.from_pretrained(base(), tmp_path, **options).eval()
    assert not trainable_names(loaded)
    assert all(p.device.type == "cpu" for p in loaded.parameters())
    assert torch.equal(logits(loaded), logits(model))
    further = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True, **options)
    assert trainable_names(further) == trainable_names(model)


@pytest.mark.parametrize("name", ["default", "mine"])
def test_an_adapter_of_another_name_travels(name, tmp_path):
    model = get_peft_model(base(), config_for(), adapter_name=name)
    randomise(model, adapter=name).eval().save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    loaded = PeftModel.from_pretrained(base(), folder).eval()  # as "default"
    assert torch.equal(logits(loaded), logits(model))


def test_the_file_says_what_it_is(tmp_path):
    adapted(gate_rescale="exact").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["gate_rescale"], written["r"]) == ("MOELORA", "exact", 2)
    assert isinstance(PeftConfig.from_pretrained(tmp_path), MoeLoraConfig)


# What trains.


def test_only_experts_and_gates_train():
    model = adapted()
    names = trainable_names(model)
    assert len(names) == 4 * 3
    kinds = {name.partition("_proj.")[2] for name in names}
    assert kinds == {
        "moelora_A.default.weight",
        "moelora_B.default.weight",
        "moelora_gate.default.weight",
    }
    # 4 modules: q 16 -> 16, v 16 -> 8; A (6, 16), B (out, 6), router (3, 16)
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 2 * (2 * 6 * 16 + 16 * 6 + 8 * 6 + 2 * 3 * 16)
    assert total > trainable


def biased() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ("none", set()),
        ("moelora_only", {"0.base_layer.bias"}),
        ("all", {"0.base_layer.bias", "1.bias", "2.bias"}),
    ],
)
def test_biases_train_and_travel(bias, expected, tmp_path):
    config = config_for(target_modules=["0"], bias=bias)
    model = get_peft_model(biased(), config)
    names = {name.removeprefix("base_model.model.") for name in trainable_names(model)}
    assert {name for name in names if name.endswith("bias")} == expected
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(biased(), tmp_path)
    x = torch.randn(5, 4)
    assert torch.equal(loaded(x), model(x))


def test_modules_to_save_train_whole_and_travel(tmp_path):
    def bert() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        return BertForSequenceClassification(
            BertConfig(vocab_size=40, num_attention_heads=4, num_labels=3, **sizes)
        ).eval()

    config = config_for(
        target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS"
    )
    model = randomise(get_peft_model(bert(), config)).eval()
    head = "base_model.model.classifier.modules_to_save.default"
    assert {f"{head}.weight", f"{head}.bias"} < trainable_names(model)
    model.get_parameter(f"{head}.weight").data.normal_()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(bert()))


# Several adapters.


def test_token_rows_train_and_travel(tmp_path):
    model = adapted(trainable_token_indices=[3, 5])
    optimizer = build_optimizer(model, "rsgd", lr=0.1)
    before = model.get_input_embeddings()(torch.arange(8)).detach().clone()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    moved = (model.get_input_embeddings()(torch.arange(8)) != before).any(-1)
    assert moved.nonzero().flatten().tolist() == [3, 5]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path)), logits(model))


def two_adapters() -> PeftModel:
    model = adapted(seed=1)
    other = config_for(
        r=3, num_experts=4, top_k=1, target_modules=["v_proj", "o_proj"], gate_rescale="exact"
    )
    model.add_adapter("second", other)
    return randomise(model, seed=2, adapter="second")


def second_alone() -> PeftModel:
    """The same as the second of `two_adapters`, on a base of its own."""
    pair = two_adapters()
    model = get_peft_model(base(), pair.peft_config["second"])
    model.load_state_dict(
        {
            key.replace(".second", ".default"): value
            for key, value in pair.state_dict().items()
            if ".second" in key
        },
        strict=False,
    )
    return model.eval()


def test_a_second_adapter_neither_acts_nor_trains_until_it_is_active():
    first = adapted(seed=1)
    model = two_adapters()
    assert model.active_adapters == ["default"]
    assert trainable_names(model) == trainable_names(first)
    assert torch.equal(logits(model), logits(first))
    model.set_adapter("second")
    assert {name.split("moelora_")[1] for name in trainable_names(model)} == {
        "A.second.weight",
        "B.second.weight",
        "gate.second.weight",
    }
    assert torch.equal(logits(model), logits(second_alone()))
    model.set_adapter("default")
    assert trainable_names(model) == trainable_names(first)
    assert torch.equal(logits(model), logits(first))


def test_adapters_keep_their_own_settings():
    model = two_adapters()
    layer = next(m for name, m in moelora_layers(model).items() if name.endswith("v_proj"))
    assert len(layer.expert_weights("default")) == 3
    assert len(layer.expert_weights("second")) == 4
    assert layer.moelora_gate_rescale == {"default": "none", "second": "exact"}
    assert layer.router_weights("second").shape == (4, 16)
    assert {n: m.scaling for n, m in layer.moelora_mixture.items()} == {
        "default": 16 / 2,
        "second": 16 / 3,
    }


def test_two_active_adapters_add_up():
    model = two_adapters()
    model.base_model.set_adapter(["default", "second"])
    layer = next(m for name, m in moelora_layers(model).items() if name.endswith("v_proj"))
    x = torch.randn(5, 16)
    both = layer(x)
    plain = layer.base_layer(x)
    parts = []
    for adapter in ("default", "second"):
        layer.set_adapter(adapter)
        parts.append(layer(x) - plain)
    # Adding in another order, in fp32.
    torch.testing.assert_close(both, plain + parts[0] + parts[1], rtol=1e-5, atol=1e-5)
    model.base_model.set_adapter(["default", "second"])
    logits(model)
    model(input_ids=IDS).logits.sum().backward()
    assert len(trainable_names(model)) == 8 * 3
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # The second selects one expert, whose share is the whole whatever the logits are.
            is_constant = "moelora_gate.second" in name
            assert bool(parameter.grad.count_nonzero()) != is_constant, name


def test_a_deleted_adapter_leaves_the_other_alone():
    first = adapted(seed=1)
    model = two_adapters()
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]
    assert not [name for name in model.state_dict() if "second" in name]
    assert torch.equal(logits(model), logits(first))
    layer = next(m for name, m in moelora_layers(model).items() if name.endswith("v_proj"))
    assert list(layer.moelora_mixture) == ["default"]


def test_deleting_the_active_adapter_activates_the_other():
    """Both on the same modules: PEFT picks the next from the first adapted module."""
    model = adapted(seed=1)
    model.add_adapter("second", config_for(r=3))
    randomise(model, seed=2, adapter="second")
    with pytest.warns(UserWarning, match="Adapter default was active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    alone = get_peft_model(base(), config_for(r=3)).eval()
    for layer, other in zip(
        moelora_layers(model).values(), moelora_layers(alone).values(), strict=True
    ):
        other.moelora_A["default"].weight.data.copy_(layer.moelora_A["second"].weight)
        other.moelora_B["default"].weight.data.copy_(layer.moelora_B["second"].weight)
        other.router_weights().copy_(layer.router_weights("second"))
    assert torch.equal(logits(model), logits(alone))


def test_biases_that_peft_would_not_save_are_refused(monkeypatch):
    monkeypatch.setattr("peft.__version__", "0.20.0")
    with pytest.raises(ConfigError, match=r"bias='all' .* install PEFT 0\.21"):
        get_peft_model(biased(), config_for(target_modules=["0"], bias="all"))
    get_peft_model(biased(), config_for(target_modules=["0"]))


def test_load_adapter_beside_another(tmp_path):
    second_alone().save_pretrained(tmp_path)
    model = adapted(seed=1)
    model.load_adapter(tmp_path, "loaded")
    assert torch.equal(logits(model), logits(adapted(seed=1)))
    assert trainable_names(model) == trainable_names(adapted())  # the active one goes on training
    model.set_adapter("loaded")
    assert torch.equal(logits(model), logits(second_alone()))


def test_each_of_two_adapters_is_saved_to_a_folder_of_its_own(tmp_path):
    two_adapters().save_pretrained(tmp_path)
    first = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(logits(first), logits(adapted(seed=1)))
    second = PeftModel.from_pretrained(base(), tmp_path / "second").eval()
    assert torch.equal(logits(second), logits(second_alone()))


def test_disabled_with_two_adapters_it_is_the_base():
    model = two_adapters()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base()))
    assert torch.equal(logits(model), logits(adapted(seed=1)))


def test_unload_gives_the_base_back():
    model = two_adapters()
    unloaded = model.unload()
    assert not [m for m in unloaded.modules() if isinstance(m, MoeLoraLinear)]
    assert torch.equal(logits(unloaded), logits(base()))


def test_state_dicts_fit_models_of_other_adapter_names():
    model = two_adapters()
    stripped = get_peft_model_state_dict(model, adapter_name="second")
    assert len(stripped) == 4 * 3
    assert not [key for key in stripped if "second" in key or "default" in key]


def test_it_cannot_be_mixed_with_lora_by_accident():
    model = adapted()
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
