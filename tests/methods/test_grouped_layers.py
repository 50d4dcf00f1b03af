"""Layers that compute the selected experts alone: when they do, and that it changes no number."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from moelora_plugin import MoeLoraConfig
from moelora_plugin.experts import lora
from moelora_plugin.ops.grouped import grouped_experts, prefers_grouped

WIDTH, EXPERTS = 24, 8
CASES = {
    "topk": {},
    "hard": {"router": "hard", "top_k": 1},
    "expert_choice": {"router": "expert_choice"},
    "noisy_topk": {"router": "noisy_topk"},
    "sinkhorn": {"router": "sinkhorn"},
    "capacity": {"router_modifiers": {"capacity": 3}},
    "expert dropout": {"router_modifiers": {"expert_dropout": 0.3}},
    "one decision per sequence": {"router_input": "sequence"},
    "universal expert": {"universal_expert": "one"},
    "rank": {"expert": "rank", "r": 1},
    "dora": {"expert": "dora"},
    "frozen_sparse_a": {"expert": "frozen_sparse_a"},
    "pissa": {"init": "pissa"},
    "sqrt": {"gate_rescale": "sqrt"},
    "exact, output": {"gate_rescale": "exact", "gate_rescale_scope": "output"},
    "auxiliary loss": {"aux_losses": {"switch_lb": 0.5}},
}
DENSE = {
    "softmax": {"router": "softmax"},
    "straight through": {"router": "hard", "top_k": 1, "router_kwargs": {"straight_through": True}},
    "threshold": {"router": "threshold"},
    "complement": {"universal_expert": "complement"},
    "shared_a": {"expert": "shared_a"},
    "ranks that differ": {
        "allocation": "pattern",
        "allocation_kwargs": {"r": {"linear": [1, 2, 3, 2, 2, 2, 2, 2]}},
    },
}


class Net(nn.Module):
    """One linear, adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.linear(x)


def adapted(keys):
    torch.manual_seed(0)
    defaults = {"r": 2, "num_experts": EXPERTS, "top_k": 2, "lora_dropout": 0.2}
    config = MoeLoraConfig(target_modules=["linear"], **(defaults | keys))
    net = get_peft_model(Net().double(), config).double()
    for parameter in net.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return net


def answers(net, monkeypatch, by_groups):
    """Output and gradients on the path that is forced, and how often it was the grouped one."""
    taken = []

    def counted(*args):
        taken.append(args)
        return grouped_experts(*args)

    monkeypatch.setattr(lora, "prefers_grouped", lambda *args: by_groups)
    monkeypatch.setattr(lora, "grouped_experts", counted)
    torch.manual_seed(1)
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    y = net(x)
    learned = {n: p for n, p in net.named_parameters() if p.requires_grad}
    upstream = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, *learned.values()], upstream, allow_unused=True)
    return {"y": y, **dict(zip(["x", *learned], grads, strict=True))}, len(taken)


@pytest.mark.parametrize("keys", CASES.values(), ids=CASES)
def test_both_paths_give_the_same_numbers(keys, monkeypatch):
    net = adapted(keys)
    grouped, times = answers(net, monkeypatch, by_groups=True)
    assert times == 1
    dense, times = answers(net, monkeypatch, by_groups=False)
    assert times == 0
    for name, expected in dense.items():
        # Sums in another order, in float64.
        torch.testing.assert_close(
            grouped[name], expected, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("keys", DENSE.values(), ids=DENSE)
def test_what_groups_cannot_compute_stays_dense(keys, monkeypatch):
    _, times = answers(adapted(keys), monkeypatch, by_groups=True)
    assert times == 0


def test_the_choice_follows_the_measured_crossover():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        layer = {"tokens": 2048, "selected": 2, "rank": 16, "width": 2048, "device_type": "cpu"}
        picked = [prefers_grouped(experts=experts, **layer) for experts in (4, 8, 16, 32, 128)]
        assert picked == [False, False, True, True, True]
        # As many experts as ever, but all of them selected.
        assert not prefers_grouped(experts=128, **(layer | {"selected": 128}))
        # A token at a time pays for its experts, unless they are few.
        assert prefers_grouped(experts=128, **(layer | {"tokens": 1}))
        assert not prefers_grouped(experts=16, **(layer | {"tokens": 1}))
        assert not prefers_grouped(experts=128, **(layer | {"device_type": "cuda"}))
        torch.set_num_threads(2)
        assert not prefers_grouped(experts=16, **layer)
        assert prefers_grouped(experts=32, **layer)
    finally:
        torch.set_num_threads(threads)
