"""Several adapters on one load of the base."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, LoraModel, PeftModel, PromptTuningConfig, get_peft_model
from tiny import tiny_llama
from transformers import LlamaForCausalLM

from moelora_plugin import MoeLoraConfig
from moelora_plugin.errors import ConfigError
from moelora_plugin.evaluation import EvaluationReport, EvaluationRequest, evaluate, subjects

TASKS = ("stsb", "sst2_gen")


def save(folder: Path, base: str, config: Any) -> str:
    """An adapter of another type, all of whose trained parameters matter."""
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture
def lora_folder(base_folder: str, tmp_path: Path) -> str:
    return save(tmp_path / "lora", base_folder, LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.fixture
def score(data_dir: str, output: Path) -> Any:
    def scored(*adapters: str, **change: Any) -> EvaluationReport:
        request = {"tasks": TASKS, "adapters": adapters, "data_dir": data_dir, "cache": False}
        request |= {"device": "cpu", "output": output, "overwrite": True}
        return evaluate(EvaluationRequest(**request | change))

    return scored


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The bases that are loaded."""
    loaded: list[str] = []
    load = subjects.load_base_model

    def counted(name: str, **keys: Any) -> Any:
        loaded.append(name)
        return load(name, **keys)

    monkeypatch.setattr(subjects, "load_base_model", counted)
    return loaded


def same(report: EvaluationReport, alone: EvaluationReport, name: str) -> None:
    for task in report.tasks:
        one, other = (r.predictions[name][task] for r in (report, alone))
        np.testing.assert_array_equal(one.pred, other.pred)
        assert one.answers == other.answers


def test_each_scores_as_alone_whatever_its_type(
    score: Any, adapter_folder: str, lora_folder: str, base_folder: str, loads: list[str]
) -> None:
    together = score(lora_folder, adapter_folder, compare_base=True)
    assert loads == [base_folder]
    assert list(together.models) == ["base", "lora", "adapter"]
    assert together.models["lora"]["adapters"]["default"]["peft_type"] == "LORA"
    same(together, score(base=base_folder), "base")
    same(together, score(lora_folder), "lora")
    same(together, score(adapter_folder), "adapter")
    ratings = [by_task["stsb"].pred.tolist() for by_task in together.predictions.values()]
    assert ratings[0] != ratings[1] != ratings[2] != ratings[0]


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj"], bias="all"),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"),
        LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]),
        MoeLoraConfig(r=2, num_experts=2, top_k=1, trainable_token_indices=[40, 50]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=["biases", "head", "pissa", "more layers", "tokens", "prompt"],
)
def test_what_one_leaves_behind_does_not_reach_the_next(
    score: Any, base_folder: str, tmp_path: Path, config: Any
) -> None:
    with_biases = tiny_llama().config
    with_biases.attention_bias = True
    LlamaForCausalLM(with_biases).save_pretrained(base_folder)
    first = save(tmp_path / "first", base_folder, config)
    second = save(tmp_path / "second", base_folder, LoraConfig(r=2, target_modules=["v_proj"]))
    together = score(first, second, tasks=("stsb",))
    same(together, score(second, tasks=("stsb",)), "second")
    ratings = [by_task["stsb"].pred.tolist() for by_task in together.predictions.values()]
    assert ratings[0] != ratings[1]


def test_an_adapter_that_cannot_be_taken_off_costs_no_scores(
    score: Any, adapter_folder: str, lora_folder: str, base_folder: str, loads: list[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoraModel, "unload", _broken)
        together = score(lora_folder, adapter_folder)
    assert loads == 2 * [base_folder]
    same(together, score(adapter_folder), "adapter")


def _broken(model: Any) -> Any:
    raise TypeError("cannot assign 'torch.FloatTensor' as parameter 'weight'")


def test_a_base_with_changed_weights_is_loaded_anew(
    score: Any,
    adapter_folder: str,
    lora_folder: str,
    base_folder: str,
    loads: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unload = PeftModel.__getattr__

    def left_behind(model: Any, name: str) -> Any:
        if name != "unload":
            return unload(model, name)

        def unloaded() -> Any:
            base = unload(model, name)()
            with torch.no_grad():
                base.model.norm.weight[0] += 1
            return base

        return unloaded

    monkeypatch.setattr(PeftModel, "__getattr__", left_behind)
    together = score(lora_folder, adapter_folder)
    assert loads == 2 * [base_folder]
    same(together, score(adapter_folder), "adapter")


def test_adapters_of_two_bases_are_refused_before_one_is_loaded(
    score: Any, adapter_folder: str, lora_folder: str, loads: list[str]
) -> None:
    path = Path(lora_folder) / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "some/other"}))
    with pytest.raises(ConfigError, match=r"and .*lora on some/other; evaluate them apart, or"):
        score(adapter_folder, lora_folder)
    path.write_text(json.dumps(config | {"revision": "v2"}))
    with pytest.raises(ConfigError, match=r"and .*lora on .*base at v2; evaluate them apart, or"):
        score(adapter_folder, lora_folder)
    assert loads == []


def test_the_revision_that_an_adapter_records_is_loaded(
    score: Any, lora_folder: str, base_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(lora_folder) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": "v2"}))
    asked: list[Any] = []
    monkeypatch.setattr(
        subjects, "load_base_model", lambda name, **keys: (asked.append(keys), tiny_llama())[1]
    )
    score(lora_folder)
    score(lora_folder, base=base_folder)
    score(lora_folder, base=base_folder + "/", allow_base_mismatch=True)  # another name for it
    assert [keys["revision"] for keys in asked] == ["v2", "v2", None]


def test_an_adapter_is_let_go_before_the_next(
    score: Any,
    adapter: PeftModel,
    adapter_folder: str,
    lora_folder: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive: list[Any] = []
    hooks: list[int] = []
    load = subjects.load_adapter

    def loaded(path: str, *, base: Any, **keys: Any) -> Any:
        gc.collect()
        assert not any(reference() is not None for reference in alive), "an adapter is still held"
        hooks.append(len(base._forward_pre_hooks) + len(base._forward_hooks))
        model, processor = load(path, base=base, **keys)
        alive.append(weakref.ref(model))
        return model, processor

    monkeypatch.setattr(subjects, "load_adapter", loaded)
    score(adapter_folder, lora_folder, tasks=("sst2",))
    assert len(alive) == 2
    assert hooks == [0, 0]
