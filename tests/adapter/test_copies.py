"""Who copies an adapter by its named parameters, as TRL makes a reference, has all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from preset_cases import ATTENTION, adapted, base, grown, ids_of, randomized, toy_batch
from torch import nn

from moelora_plugin import PRESETS, MoeLoraConfig
from moelora_plugin.call import routing_ids
from moelora_plugin.errors import ConfigError
from moelora_plugin.frozen import KeepsFrozen
from moelora_plugin.initialization import INITIALIZATIONS
from moelora_plugin.model import routed_layers
from moelora_plugin.routers import ROUTERS
from moelora_plugin.routers.modifiers import MODIFIERS

SMALL: dict[str, Any] = {"r": 2, "num_experts": 4, "top_k": 2, "lora_dropout": 0.0}
# What can be part of an adapter beside the presets', by a name for the test.
PARTS: dict[str, dict[str, Any]] = {
    **{
        f"init {name}": {"init": name}
        for name in INITIALIZATIONS
        if name != "adapters"  # presets have it
    },
    "a threshold that does not train": {
        "router": "sigmoid",
        "router_kwargs": {"max_threshold": 0.5},
    },
    "fixed logits": {
        "router_score": "static",
        "router_score_kwargs": {"trainable": False, "value": 0.3},
        "router": "softmax",
    },
    "frozen experts": {"expert_kwargs": {"frozen": True}},
    "modifiers": {"router_modifiers": {name: m.example for name, m in MODIFIERS.items()}},
}


def copied(model: PeftModel, into: str) -> PeftModel:
    """What TRL's DPO, KTO, GRPO and RLOO trainers do to have a reference."""
    model.add_adapter(into, model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            copy = model.get_parameter(name.replace(".default.", f".{into}."))
            copy.data.copy_(parameter.data)
    return model.train(model.training)  # new modules are in training mode


def logits(model: nn.Module, preset: str | None = None) -> torch.Tensor:
    batch = {key: value for key, value in toy_batch().items() if key != "labels"}
    with torch.no_grad(), routing_ids(model, **(ids_of(preset) if preset else {})):
        return model(**batch, use_cache=False).logits


def assert_the_copy_answers_alike(model: PeftModel, preset: str | None = None) -> None:
    expected = logits(model, preset)
    copied(model, "ref")
    model.set_adapter("ref")
    assert torch.equal(logits(model, preset), expected)
    model.set_adapter("default")
    assert torch.equal(logits(model, preset), expected)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_copy_of_a_preset_is_the_same_model(preset):
    assert_the_copy_answers_alike(randomized(adapted(preset)).eval(), preset)


@pytest.mark.parametrize("part", PARTS)
def test_a_copy_of_each_part_is_the_same_model(part):
    config = MoeLoraConfig(**{**SMALL, "target_modules": ATTENTION, **PARTS[part]})
    assert_the_copy_answers_alike(randomized(get_peft_model(base(), config)).eval())


def frozen(model: nn.Module) -> dict[str, bool]:
    """Whether each frozen tensor trains, by its name."""
    return {
        f"{name}.{key}": module.get_parameter(key).requires_grad
        for name, module in model.named_modules()
        if isinstance(module, KeepsFrozen)
        for key in module.frozen_names
    }


# What PEFT offers that sets `requires_grad` or puts other tensors in their place.
TURNS = {
    "set_adapter": lambda model: model.set_adapter("default"),
    "set_requires_grad": lambda model: model.base_model.set_requires_grad("default", True),
    "enable_adapter_layers": lambda model: (
        model.base_model.disable_adapter_layers(),
        model.base_model.enable_adapter_layers(),
    ),
    "disable_adapter": lambda model: model.disable_adapter().__enter__(),
    "another adapter": lambda model: (
        copied(model, "ref"),
        model.set_adapter("ref"),
        model.delete_adapter("default"),
    ),
    "layers": lambda model: [
        layer.requires_grad_(True)
        for module in routed_layers(model).values()
        for container in ("moelora_gate", "moelora_router", "moelora_modifiers")
        for layer in getattr(module, container).values()
    ],
    "a loader": lambda model: [
        setattr(module, key, nn.Parameter(module.get_parameter(key).detach().clone()))
        for module in model.modules()
        if isinstance(module, KeepsFrozen)
        for key in module.frozen_names
        if module.get_parameter(key).is_floating_point()
    ],
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("part", ["init pissa", "a threshold that does not train", "fixed logits"])
def test_what_is_frozen_stays_frozen(part, turn):
    config = MoeLoraConfig(**{**SMALL, "target_modules": ATTENTION, **PARTS[part]})
    model = get_peft_model(base(), config).train()
    TURNS[turn](model)
    assert frozen(model)
    assert not any(frozen(model).values())


def test_biases_of_a_router_that_are_frozen_are_none_of_the_model_s():
    parts = PARTS["a threshold that does not train"]
    config = MoeLoraConfig(**{**SMALL, "target_modules": ATTENTION, **parts, "bias": "all"})
    model = get_peft_model(base(), config)
    assert any(name.endswith("bias") for name in frozen(model))
    assert not any(frozen(model).values())


@pytest.mark.parametrize("preset", ["flylora", "moa", "mole_wu", "goat", "xlora"])
def test_frozen_presets_stay_frozen_and_are_counted(preset):
    model = grown(preset).train()
    before = frozen(model)
    assert before
    assert not any(before.values())
    trained, total = model.get_nb_trainable_parameters()
    entries = {n: p.numel() for n, p in model.named_parameters()}
    assert total == sum(entries.values())
    assert trained == sum(entries[n] for n, p in model.named_parameters() if p.requires_grad)
    assert sum(entries[name] for name in before) <= total - trained


def test_a_router_of_one_s_own_may_keep_no_buffer(monkeypatch):
    class Counting(ROUTERS["softmax"]):
        def __init__(self, in_features, plan):
            super().__init__(in_features, plan)
            self.register_buffer("seen", torch.zeros(plan.num_experts))

    monkeypatch.setitem(ROUTERS, "counting", Counting)
    config = MoeLoraConfig(**SMALL, target_modules=ATTENTION, router="counting")
    with pytest.raises(ConfigError, match=r"Counting keeps 'seen' .*register_frozen"):
        get_peft_model(base(), config)
