"""An optimizer's state through a file: the run goes on as if it had not stopped."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import get_peft_model
from torch import nn

from moelora_plugin import MoeLoraConfig, build_optimizer
from moelora_plugin.errors import ConfigError
from moelora_plugin.model import moelora_layers
from moelora_plugin.optim import OPTIMIZERS
from moelora_plugin.types import LayerPlan


def unequal_ranks(config: MoeLoraConfig, module_name: str) -> LayerPlan:
    return LayerPlan(num_experts=3, top_k=2, ranks=(1, 3, 2), alpha=4.0)


def start(name: str, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    config = MoeLoraConfig(
        num_experts=3,
        top_k=2,
        lora_dropout=0.0,
        target_modules=["0"],
        modules_to_save=["2"],
        allocation=f"{__name__}.unequal_ranks",
    )
    model = get_peft_model(net, config)
    for layer in moelora_layers(model).values():
        for _, b in layer.expert_weights():
            b.normal_(std=0.1)
    if OPTIMIZERS[name].optimizer.__name__ == "RiemannianSGD":
        options = {**options, "momentum": 0.9}
    optimizer = build_optimizer(
        model, name, lr=0.01, gate_lr=0.01, damping=1e-3, lora_plus_ratio=2.0, **options
    )
    return model, optimizer


def run(model, optimizer, steps: range) -> list[torch.Tensor]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        loss = model(torch.randn(16, 6, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


CASES = [
    (name, order, bias_correction)
    for name, order, bias_correction in itertools.product(
        OPTIMIZERS, ["jacobi", "gauss_seidel"], [True, False]
    )
    if bias_correction or "adamw" in name
]


@pytest.mark.parametrize(("name", "order", "bias_correction"), CASES)
def test_resuming_gives_the_same_steps_to_the_bit(name, order, bias_correction, tmp_path):
    options = {"order": order, "bias_correction": bias_correction}
    model, optimizer = start(name, **options)
    run(model, optimizer, range(3))
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state"
    )
    losses = run(model, optimizer, range(3, 6))

    resumed, second = start(name, **options)
    state = torch.load(tmp_path / "state", weights_only=True)
    resumed.load_state_dict(state["model"])
    second.load_state_dict(state["optimizer"])
    assert torch.equal(torch.stack(run(resumed, second, range(3, 6))), torch.stack(losses))
    for (key, value), other in zip(
        model.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), key


def test_options_of_the_metric_are_those_of_the_file(tmp_path):
    """torch's own, such as lr, are taken from the file; ours are never taken in silence."""
    model, optimizer = start("gradamw", order="gauss_seidel")
    run(model, optimizer, range(2))
    torch.save(optimizer.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    _, other = start("gradamw", order="jacobi")
    with pytest.raises(ConfigError, match="order is 'jacobi' in this run"):
        other.load_state_dict(state)
    _, same = start("gradamw", order="gauss_seidel")
    same.load_state_dict(state)
    assert same.param_groups[0]["ranks"] == [[1, 3, 2]]


def test_an_optimizer_for_other_experts_is_refused(tmp_path):
    _, optimizer = start("gradamw")
    state = optimizer.state_dict()
    state["param_groups"] = state["param_groups"][:1]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(state)
