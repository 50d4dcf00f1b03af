"""Adapters that transformers or PEFT's low-level functions put on a model, without a PeftModel."""

from __future__ import annotations

import functools
import json
import logging
import warnings
from pathlib import Path

import pytest
import torch
from native import natively
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from preset_cases import (
    ATTENTION,
    IDS,
    SMALLER,
    adapted,
    base,
    config_of,
    folder_of_the_run,
    ids_of,
    randomized,
    toy_batch,
)
from torch import nn
from transformers import AutoModelForCausalLM

from moelora_plugin import PRESETS, MoeLoraConfig, build_optimizer
from moelora_plugin.analysis.routing import routing_statistics
from moelora_plugin.call import routing_ids
from moelora_plugin.errors import ExportError
from moelora_plugin.layers.block import blocks_of
from moelora_plugin.model import moelora_layers, routed_layers

BATCH = {key: value for key, value in toy_batch().items() if key != "labels"}
SMALL = {"r": 2, "num_experts": 4, "top_k": 2, "lora_dropout": 0.0, "target_modules": ATTENTION}


def logits(model: nn.Module, preset: str | None = None) -> torch.Tensor:
    with torch.no_grad(), routing_ids(model, **(ids_of(preset) if preset else {})):
        return model.eval()(**BATCH, use_cache=False).logits


@functools.cache
def of_the_base() -> torch.Tensor:
    with torch.no_grad():
        return base()(**BATCH, use_cache=False).logits


@functools.cache
def saved(preset: str, seed: int = 5) -> tuple[Path, torch.Tensor]:
    """A folder with the preset on a saved base, and what PEFT's own loader makes of it."""
    folder = folder_of_the_run()
    base().save_pretrained(folder / "base")
    model = randomized(adapted(preset), seed=seed)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", logits(PeftModel.from_pretrained(base(), folder / "adapter"), preset)


@pytest.fixture
def reported(caplog):
    """Everything transformers has to say of a load."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@natively
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_transformers_loads_a_preset_as_peft_does(preset, reported):
    folder, expected = saved(preset)
    for name in ("default", "another"):
        model = base()
        info = model.load_adapter(folder, adapter_name=name)
        assert not {*info.missing_keys, *info.unexpected_keys, *info.mismatched_keys}
        assert torch.equal(logits(model, preset), expected)
        model.disable_adapters()
        assert torch.equal(logits(model, preset), of_the_base())
        model.enable_adapters()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder), preset), expected)
    assert "REPORT" not in reported.text


# Of every site, with frozen tensors, with a modifier's counts, with an initialisation's offset.
@natively
@pytest.mark.parametrize(
    "preset", ["moe_lora", "mixlora", "milora_prompt", "xlora", "flylora", "mole_wu", "goat"]
)
def test_what_transformers_saves_loads_again(preset, tmp_path):
    folder, expected = saved(preset)
    model = base()
    model.load_adapter(folder, adapter_name="default")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path), preset), expected)


def added(model: nn.Module, config: MoeLoraConfig, way: str, name: str = "default") -> nn.Module:
    if way == "peft":
        return inject_adapter_in_model(config, model, name)
    model.add_adapter(config, name)
    return model


# PEFT says so of every second adapter that is added without a PeftModel.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
EACH_WAY = pytest.mark.parametrize("way", [pytest.param("transformers", marks=natively), "peft"])


@EACH_WAY
@pytest.mark.parametrize("preset", ["moe_lora", "mixlora", "milora_prompt", "xlora", "flylora"])
def test_it_trains_as_under_a_peft_model(way, preset):
    """Every step alike, with rescaling and auxiliary losses."""
    targets = PRESETS[preset].overrides.get("target_modules", ATTENTION)
    keys = {"target_modules": targets, "lora_dropout": 0.0, **SMALLER.get(preset, {})}
    configs = [config_of(preset, **keys) for _ in range(2)]  # may train adapters: random numbers
    torch.manual_seed(0)
    wrapped = get_peft_model(base(), configs[0])
    torch.manual_seed(0)
    alone = added(base(), configs[1], way)
    found = []
    for model in (wrapped, alone):
        torch.manual_seed(1)
        optimizer = build_optimizer(model, "gradamw", lr=1e-2, gate_lr=1e-2)
        for _ in range(3):
            model.train()(**toy_batch(), use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        modes = {m for layer in routed_layers(model).values() for m in
                 layer.moelora_gate_rescale.values()}  # fmt: skip
        assert modes == {"sqrt"}
        found.append(logits(model))
    assert torch.equal(found[0], found[1])


@EACH_WAY
def test_what_is_saved_names_the_exponent_that_was_used(way, tmp_path):
    model = added(base(), MoeLoraConfig(**SMALL), way)
    build_optimizer(model, "grsgd")
    assert model.peft_config["default"].gate_rescale == "auto"
    if way == "transformers":
        model.save_pretrained(tmp_path)
    else:
        model.peft_config["default"].save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["gate_rescale"] == "sqrt"


@EACH_WAY
@pytest.mark.parametrize("site", ["linear", "block"])
def test_two_adapters_share_what_the_model_shares(way, site):
    targets = ATTENTION if site == "linear" else ["gate_proj", "up_proj", "down_proj"]
    keys = {**SMALL, "target_modules": targets, "site": site, "aux_losses": {"switch_lb": 0.1}}
    torch.manual_seed(0)
    model = added(base(), MoeLoraConfig(**keys), way)
    model = added(model, MoeLoraConfig(**keys), way, "second")
    assert len({id(layer.shared) for layer in routed_layers(model).values()}) == 1
    for name in ("default", "second"):
        for layer in routed_layers(model).values():
            layer.set_adapter(name)
        model.train()(**toy_batch(), use_cache=False).loss.backward()
        assert all(layer.last_aux_losses[name] for layer in routed_layers(model).values()
                   if name in layer.moelora_router)  # fmt: skip
    randomized(model, "default")
    alone = randomized(added(base(), MoeLoraConfig(**keys), way), "default")
    for layer in routed_layers(model).values():
        layer.set_adapter("default")
    state = {k: v for k, v in model.state_dict().items() if ".second." not in k}
    alone.load_state_dict(state)
    assert torch.equal(logits(model), logits(alone))


@natively
@pytest.mark.parametrize("preset", ["moe_lora", "mixlora", "milora_prompt", "xlora", "flylora"])
def test_a_deleted_adapter_leaves_the_other(preset):
    (one, first), (two, second) = saved(preset), saved(preset, seed=6)
    model = base()
    model.load_adapter(one, adapter_name="one")
    model.load_adapter(two, adapter_name="two")
    for name, expected in (("one", first), ("two", second), ("one", first)):
        model.set_adapter(name)
        assert torch.equal(logits(model, preset), expected)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Adapter one was active")
        model.delete_adapter("one")
    assert torch.equal(logits(model, preset), second)
    assert not any("one" in layer.moelora_router for layer in routed_layers(model).values())
    model.delete_adapter("two")
    assert torch.equal(logits(model, preset), of_the_base())
    assert not any(block.moelora_router for _, block in blocks_of(model))


@natively
def test_statistics_ids_and_merges_go_by_the_layers():
    config = MoeLoraConfig(
        **{**SMALL, "router_input": "task", "router_score": "embedding"},
        router_score_kwargs={"num_ids": 2},
    )
    model = randomized(added(base(), config, "transformers"))
    with torch.no_grad():
        by_argument = model.eval()(**BATCH, task_id=IDS, use_cache=False).logits
    with routing_ids(model, task_id=IDS):
        assert torch.equal(logits(model), by_argument)
        with routing_statistics(model) as statistics:
            logits(model)
        assert statistics.layers.keys() == moelora_layers(model).keys()
        layer = next(iter(moelora_layers(model).values()))
        with pytest.raises(ExportError):
            layer.merge()
