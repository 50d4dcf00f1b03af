"""Parity with the paper's reference implementation: numbers it produced, reproduced in float64.

`golden/official_parity.safetensors` holds inputs, gradients and five steps of both of its
optimizers on `down(tanh(up(x)))`. Its rescaling detaches whole expert outputs (scope "output"), its
AdamW has no bias correction and takes B's metric from the updated A (gauss_seidel); its SGD uses
the old values (jacobi).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from torch import nn

from moelora_plugin import MoeLoraConfig, build_optimizer

GOLDEN = Path(__file__).parents[1] / "golden" / "official_parity.safetensors"

# The reference multiplies expert by expert, we multiply all experts at once: sums in another order,
# some thousand roundings of 1e-16 each. The issue asks for 1e-9.
TOLERANCE = {"rtol": 0.0, "atol": 1e-9}

RESCALE = {"conventional": "none", "sqrt": "sqrt"}


class Net(nn.Module):
    def __init__(self, d_in: int, hidden: int, d_out: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_in, hidden, bias=False)
        self.down = nn.Linear(hidden, d_out)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
        return meta, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def build(golden, mode: str):
    meta, tensors = golden
    net = Net(meta["d_in"], meta["hidden"], meta["d_out"]).double()
    state = {
        key.removeprefix("base.").replace("base_layer.", ""): value
        for key, value in tensors.items()
        if key.startswith("base.")
    }
    net.load_state_dict(state)
    config = MoeLoraConfig(
        num_experts=meta["num_experts"],
        top_k=meta["top_k"],
        r=meta["r"],
        lora_alpha=meta["alpha"],
        lora_dropout=0.0,
        target_modules=["up", "down"],
        gate_rescale=RESCALE[mode],
        gate_rescale_scope="output",
    )
    model = get_peft_model(net, config)
    for name in ("up", "down"):
        layer = getattr(net, name)
        for i, (a, b) in enumerate(layer.expert_weights()):
            a.copy_(tensors[f"init.{name}.lora_A.{i}.weight"])
            b.copy_(tensors[f"init.{name}.lora_B.{i}.weight"])
        layer.router_weights().copy_(tensors[f"init.{name}.gate.weight"])
    return net, model


def reference_layout(net: Net, of) -> dict[str, torch.Tensor]:
    """Our tensors under the reference's names, one per expert; `of` picks value or gradient."""
    named = {}
    for name in ("up", "down"):
        layer = getattr(net, name)
        ranks = layer.moelora_mixture["default"].plan.ranks
        a_blocks = of(layer.moelora_A["default"].weight).split(ranks, dim=0)
        b_blocks = of(layer.moelora_B["default"].weight).split(ranks, dim=1)
        for i, (a, b) in enumerate(zip(a_blocks, b_blocks, strict=True)):
            named[f"{name}.lora_A.{i}.weight"] = a
            named[f"{name}.lora_B.{i}.weight"] = b
        named[f"{name}.gate.weight"] = of(layer.moelora_gate["default"].weight)
    return named


@pytest.mark.parametrize("mode", ["conventional", "sqrt"])
def test_forward_and_every_gradient(golden, mode):
    _, tensors = golden
    net, _ = build(golden, mode)
    x = tensors["x"].clone().requires_grad_()
    y = net(x)
    loss = ((y - tensors["target"]) ** 2).mean()
    loss.backward()

    torch.testing.assert_close(y, tensors[f"{mode}.y"], **TOLERANCE)
    torch.testing.assert_close(loss, tensors[f"{mode}.loss"].reshape(()), **TOLERANCE)
    torch.testing.assert_close(x.grad, tensors[f"{mode}.grad_x"], **TOLERANCE)
    found = reference_layout(net, lambda p: p.grad)
    expected = {k: v for k, v in tensors.items() if k.startswith(f"{mode}.grad.")}
    assert {f"{mode}.grad.{name}" for name in found} == set(expected)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[f"{mode}.grad.{name}"], **TOLERANCE, msg=name)


@pytest.mark.parametrize("mode", ["conventional", "sqrt"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_five_optimizer_steps(golden, mode, kind):
    meta, tensors = golden
    net, model = build(golden, mode)
    prefix = "gr" if mode == "sqrt" else "r"
    optimizer = build_optimizer(
        model,
        prefix + kind,
        lr=meta[f"lr_{kind}"],
        gate_lr=meta["gate_lr"],
        gate_max_grad_norm=1.0,
        damping=meta["reg"],
        order="jacobi" if kind == "sgd" else "gauss_seidel",
        bias_correction=False,
        betas=meta["betas"],
        eps=meta["eps"],
    )
    losses = []
    for _ in range(meta["steps"]):
        optimizer.zero_grad()
        loss = ((net(tensors["x"]) - tensors["target"]) ** 2).mean()
        losses.append(loss.detach())
        loss.backward()
        optimizer.step()

    torch.testing.assert_close(torch.stack(losses), tensors[f"{mode}.{kind}.losses"], **TOLERANCE)
    found = reference_layout(net, lambda p: p.detach())
    expected = {k: v for k, v in tensors.items() if k.startswith(f"{mode}.{kind}.final.")}
    assert {f"{mode}.{kind}.final.{name}" for name in found} == set(expected)
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[f"{mode}.{kind}.final.{name}"], **TOLERANCE, msg=name
        )
