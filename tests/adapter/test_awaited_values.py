"""An adapter whose values were left to its file, and have not come from there, is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from native import natively
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tiny import tiny_llama

from moelora_plugin import MoeLoraConfig
from moelora_plugin.errors import ConfigError
from moelora_plugin.layers.awaited import AwaitedValues
from moelora_plugin.model import find_tuner

IDS = torch.arange(3, 15).view(2, 6)
SMALL = {"r": 2, "num_experts": 2, "top_k": 1, "lora_dropout": 0.0, "target_modules": ["q_proj"]}
FIXED = {"router_input": "none", "router_score": "static"}


def base() -> Any:
    return tiny_llama(hidden=16, layers=1)


@pytest.fixture(params=["pissa", "milora", "segments"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any, dict[str, Any]]:
    """Where an adapter lies, the answers it gives, and its tensors."""
    model = get_peft_model(base(), MoeLoraConfig(**SMALL, **FIXED, init=request.param)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "moelora_B" in name:
                parameter.add_(0.1)
        answer = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    return tmp_path, answer, get_peft_model_state_dict(model)


def empty(folder: Path, inference: bool = True) -> PeftModel:
    config = MoeLoraConfig.from_pretrained(folder)
    config.inference_mode = inference
    return get_peft_model(base(), config)


def waits(model: Any) -> bool:
    tuner = find_tuner(model)
    hooks = (model if tuner is None else tuner.model)._forward_pre_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), AwaitedValues) for hook in hooks)


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.eval()(input_ids=IDS),
        lambda model: model.train()(input_ids=IDS, labels=IDS),
        lambda model: model.eval().generate(input_ids=IDS, max_new_tokens=1),
        lambda model: copy.deepcopy(model).eval()(input_ids=IDS),
        lambda model: model.merge_adapter(),
        lambda model: model.merge_and_unload(),
    ],
    ids=["forward", "training", "generate", "copy", "merge", "unload"],
)
def test_no_use_of_it_passes(saved: Any, use: Any, inference: bool) -> None:
    model = empty(saved[0], inference)
    for _ in range(2):  # not only the first time
        with pytest.raises(ConfigError, match=r"has no values.*which were not loaded"):
            use(model)


def test_neither_does_one_made_for_inference() -> None:
    model = get_peft_model(base(), MoeLoraConfig(**SMALL, init="pissa", inference_mode=True))
    with pytest.raises(ConfigError, match="has no values"):
        model.eval()(input_ids=IDS)


def by_keys(folder: Path, tensors: Any) -> Any:
    model = empty(folder)
    set_peft_model_state_dict(model, tensors)
    return model


def by_torch(folder: Path, tensors: Any) -> Any:
    model = empty(folder)
    source = PeftModel.from_pretrained(base(), folder).state_dict()
    own = {key: value for key, value in source.items() if "moelora_" in key}
    model.load_state_dict(own, strict=False)
    return model


def beside_another(folder: Path, tensors: Any) -> Any:
    model = get_peft_model(base(), MoeLoraConfig(**SMALL), "first")
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    return model


@pytest.mark.parametrize(
    "load",
    [
        by_keys,
        by_torch,
        beside_another,
        lambda folder, _: PeftModel.from_pretrained(base(), folder),
        lambda folder, _: PeftModel.from_pretrained(base(), folder, is_trainable=True),
        lambda folder, _: PeftModel.from_pretrained(base(), folder, low_cpu_mem_usage=True),
    ],
    ids=["keys", "torch", "beside", "loaded", "trainable", "low_memory"],
)
def test_what_brings_the_values_ends_the_wait(saved: Any, load: Any) -> None:
    folder, answer, tensors = saved
    model = load(folder, tensors).eval()
    assert waits(model)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, answer)
    assert not waits(model)
    with torch.no_grad():
        torch.testing.assert_close(model.merge_and_unload()(input_ids=IDS).logits, answer)


@natively
def test_transformers_own_loader_ends_it_too(saved: Any) -> None:
    folder, answer, _ = saved
    model = base()
    model.load_adapter(str(folder))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, answer)
    assert not waits(model)


def test_an_adapter_that_does_not_act_lets_the_others_pass(saved: Any) -> None:
    model = get_peft_model(base(), MoeLoraConfig(**SMALL), "first").eval()
    model.add_adapter("second", MoeLoraConfig.from_pretrained(saved[0]))
    model(input_ids=IDS)
    model.set_adapter("second")
    with model.disable_adapter():
        model(input_ids=IDS)
    with pytest.raises(ConfigError, match="'second' has no values"):
        model(input_ids=IDS)
    with pytest.raises(ConfigError, match="'second' has no values"):
        model(input_ids=IDS, adapter_names=["first", "second"])
    model.set_adapter("first")
    model.delete_adapter("second")
    model(input_ids=IDS)
    assert not waits(model)


def test_nothing_waits_where_nothing_is_awaited() -> None:
    assert not waits(get_peft_model(base(), MoeLoraConfig(**SMALL, init="pissa")))
    assert not waits(get_peft_model(base(), MoeLoraConfig(**SMALL, inference_mode=True)))
