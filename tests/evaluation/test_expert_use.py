"""Which experts an adapter uses on a task, against passes made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llama, tiny_tokenizer

from moelora_eval_tasks.catalog import TASKS
from moelora_eval_tasks.loading import load_split
from moelora_eval_tasks.prompts import render
from moelora_plugin import MoeLoraConfig
from moelora_plugin.analysis import routing_statistics
from moelora_plugin.evaluation import evaluate_model


def used_on(model: PeftModel, task: str, data_dir: str, **options: Any) -> dict[str, Any]:
    report = evaluate_model(model, tiny_tokenizer(), [task], data_dir=data_dir, **options)
    return report.predictions["model"][task].expert_use


def assert_same(used: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal up to the six digits that are kept."""
    assert {f"base_model.model.{name}" for name in used} == set(expected)
    for name, layer in used.items():
        for key, value in expected[f"base_model.model.{name}"].items():
            assert layer[key] == pytest.approx(value, abs=1e-6), (name, key)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_prompt_is_counted_without_its_padding(
    adapter: PeftModel, data_dir: str, batch_size: int
) -> None:
    """One-token answers are scored in one pass over the prompt."""
    tokenizer = tiny_tokenizer()
    adapter.eval()
    with routing_statistics(adapter) as expected, torch.no_grad():
        for row in load_split(TASKS["sst2"], "validation", data_dir):
            context = render(TASKS["sst2"], row).context
            adapter(input_ids=tokenizer(context, return_tensors="pt").input_ids)
    used = used_on(adapter, "sst2", data_dir, batch_size=batch_size)
    assert_same(used, expected.to_dict())


def test_what_is_written_is_counted_too(adapter: PeftModel, data_dir: str) -> None:
    tokenizer = tiny_tokenizer()
    prompts = [
        tokenizer(render(TASKS["sst2_gen"], row).context).input_ids
        for row in load_split(TASKS["sst2_gen"], "validation", data_dir)
    ]
    report = evaluate_model(adapter, tokenizer, ["sst2_gen"], data_dir=data_dir, batch_size=4)
    used = report.predictions["model"]["sst2_gen"].expert_use
    tokens = {layer["tokens"] for layer in used.values()}
    assert len(tokens) == 1
    # Each of the ten new tokens but the last is read again, unless the end came before.
    written = tokens.pop() - sum(map(len, prompts))
    assert 0 < written <= 9 * len(prompts)


def test_the_file_has_the_adapter_and_not_the_base(adapter: PeftModel, data_dir: str) -> None:
    report = evaluate_model(
        adapter, tiny_tokenizer(), ["rte", "stsb"], data_dir=data_dir, compare_base=True
    )
    content = report.to_dict()["expert_use"]
    assert list(content) == ["model"]
    assert list(content["model"]) == ["rte", "stsb"]
    layer = content["model"]["rte"]["model.layers.0.self_attn.q_proj"]
    assert sum(layer["load"]) == pytest.approx(1, abs=1e-5)  # four shares of six digits


def test_plain_lora_has_none(data_dir: str) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"])
    model = get_peft_model(tiny_llama(), config)
    report = evaluate_model(model, tiny_tokenizer(), ["rte"], data_dir=data_dir)
    assert report.to_dict()["expert_use"] == {}


def test_routers_that_route_no_tokens_are_recorded(data_dir: str) -> None:
    names = ["gate_proj", "up_proj", "down_proj"]
    config = MoeLoraConfig(r=2, num_experts=4, top_k=2, site="block", target_modules=names)
    model = get_peft_model(tiny_llama(), config)
    used = used_on(model, "rte", data_dir)
    assert used
    assert all(len(layer["load"]) == 4 for layer in used.values())
