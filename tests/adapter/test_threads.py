"""Threads that call one model at once: each gets the answers that it would get alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import tiny_llama
from torch import Tensor, nn

from moelora_plugin import MoeLoraConfig

FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "sequence": {"router_input": "sequence"},
    "prompt": {"router_input": "prompt"},
    "capacity": {"router_modifiers": {"capacity": 1.0}},
    "shared": {"site_kwargs": {"share": [["q_proj", "k_proj"]]}},
    "block": {"site": "block", "target_modules": FEED_FORWARD},
    "layer": {"site": "layer"},
    "model": {"site": "model"},
}


def adapted(fields: dict[str, Any]) -> PeftModel:
    torch.manual_seed(0)
    targets = {"target_modules": ["q_proj", "k_proj", "down_proj"]}
    config = MoeLoraConfig(num_experts=4, top_k=2, r=2, **targets | fields)
    model = get_peft_model(tiny_llama(), config)
    model.add_adapter("other", config)
    for name, parameter in model.named_parameters():
        if ".moelora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def requests() -> list[dict[str, Any]]:
    """Calls of the same shape that differ in what is padding, and in whose adapter answers."""
    ids = torch.arange(3, 27).view(2, 12)
    masks = torch.ones(3, 2, 12, dtype=torch.long)
    masks[1, 0, 7:] = 0
    masks[2, :, 5:] = 0
    found = [{"input_ids": ids.roll(n), "attention_mask": mask} for n, mask in enumerate(masks)]
    return [*found, {**found[0], "adapter_names": ["other", "__base__"]}]


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_calls_that_overlap_answer_as_one_after_the_other(fields: dict[str, Any]) -> None:
    model, calls = adapted(fields), requests()

    def answer(call: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(**call, use_cache=False).logits
        return logits

    alone = [answer(call) for call in calls]
    barrier = Barrier(len(calls), timeout=60)

    def meet(*_: Any) -> None:
        barrier.wait()

    # Every thread is inside the model, before and after each layer, when any goes on.
    handles = [
        register(meet)
        for layer in model.get_base_model().model.layers
        for register in (layer.register_forward_pre_hook, layer.mlp.register_forward_pre_hook)
    ]
    if fields.get("site") == "model":  # which calls the layers twice, in all threads
        assert len(handles) == 4
    with ThreadPoolExecutor(len(calls)) as threads:
        together = list(threads.map(answer, calls))
    for expected, found in zip(alone, together, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fields", [CASES["sequence"], CASES["capacity"]], ids=["sequence", "cap"])
def test_generations_that_overlap_know_their_own_prompts(fields: dict[str, Any]) -> None:
    model = adapted(fields)
    prompts = [torch.arange(3, 3 + length)[None] for length in (4, 9, 14)]

    def generate(ids: Tensor) -> list[int]:
        mask = torch.ones_like(ids)
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        found: list[int] = model.generate(input_ids=ids, attention_mask=mask, **options)[0].tolist()
        return found

    alone = [generate(ids) for ids in prompts]
    barrier = Barrier(len(prompts), timeout=60)

    def meet(*_: Any) -> None:
        barrier.wait()

    model.get_base_model().model.layers[0].register_forward_pre_hook(meet)
    with ThreadPoolExecutor(len(prompts)) as threads:
        assert list(threads.map(generate, prompts)) == alone
