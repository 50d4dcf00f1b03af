"""The fast ways through a layer give the numbers of the slow ones, and keep no more than LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapted_llama import adapted_llama, sentences
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from moelora_plugin import MoeLoraConfig
from moelora_plugin.layers import decoder
from moelora_plugin.layers.decoder import Decoder
from moelora_plugin.model import moelora_layers
from moelora_plugin.ops.rank_gated import project

WIDTH, EXPERTS, TOP_K, RANK = 24, 6, 3, 2


class Net(nn.Module):
    """One linear."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def adapted(dtype: torch.dtype = torch.float64, **keys: Any) -> Any:
    torch.manual_seed(0)
    defaults = {"r": RANK, "num_experts": EXPERTS, "top_k": TOP_K, "lora_dropout": 0.0}
    config = MoeLoraConfig(target_modules=["linear"], **(defaults | keys))
    net = get_peft_model(Net().to(dtype), config, autocast_adapter_dtype=False)
    for parameter in net.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return net


# The projection


@pytest.mark.parametrize("tokens", [3, 40], ids=["apart", "together"])
@pytest.mark.parametrize("dropout", [0.0, 0.3, 1.0])
def test_the_gate_s_product_goes_with_a_s_and_sees_no_dropout(tokens, dropout):
    torch.manual_seed(0)
    shapes = {"x": (tokens, 8), "a": (12, 8), "gate": (6, 8)}
    leaves = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes.values()]
    x, a, gate = leaves
    upstream = [torch.randn(tokens, n, dtype=torch.float64) for n in (12, 12, 6)]

    torch.manual_seed(1)
    found = project(x, a, gate, dropout)
    z_of_x = found.z_of_input
    grads = torch.autograd.grad((found.z, z_of_x, found.logits), leaves, upstream)

    torch.manual_seed(1)
    dropped = torch.native_dropout(x, dropout, True)[0] if dropout else x
    z, logits = dropped @ a.T, x @ gate.T
    # Sums of at most 40 products in another order.
    close = {"rtol": 1e-13, "atol": 1e-13}
    torch.testing.assert_close(found.z, z, **close)
    torch.testing.assert_close(found.logits, logits, **close)
    (grad_a,) = torch.autograd.grad(z, a, upstream[0], retain_graph=True)
    (grad_x,) = torch.autograd.grad((z, logits), x, upstream[1:], retain_graph=True)
    (grad_gate,) = torch.autograd.grad(logits, gate, upstream[2])
    for got, expected in zip(grads, (grad_x, grad_a, grad_gate), strict=True):
        torch.testing.assert_close(got, expected, **close)


@pytest.mark.parametrize("wanted", ["x", "a", "gate"])
def test_each_gradient_comes_alone(wanted):
    torch.manual_seed(0)
    leaves = {"x": torch.randn(30, 8), "a": torch.randn(12, 8), "gate": torch.randn(6, 8)}
    leaves[wanted].requires_grad_()
    found = project(**{"x_TI": leaves["x"], "a": leaves["a"], "gate_EI": leaves["gate"]})
    parts = [p.sum() for p in (found.z, found.z_of_input, found.logits) if p is not None]
    torch.stack(parts).sum().backward()
    ones = {"x": leaves["a"].sum(0) + leaves["gate"].sum(0), "a": leaves["x"].sum(0)}
    ones["gate"] = ones["a"]
    expected = ones[wanted].expand_as(leaves[wanted])
    # Sums of thirty fp32 numbers of order one.
    torch.testing.assert_close(leaves[wanted].grad, expected, rtol=1e-4, atol=1e-4)


def test_the_base_s_output_is_left_as_it_is():
    net, kept = adapted(), []
    net.base_model.model.linear.base_layer.register_forward_hook(lambda *a: kept.append(a[2]))
    x = torch.randn(2, 20, WIDTH, dtype=torch.float64)
    for enabled in (True, False):
        net.train(enabled)  # the second time a few tokens are decoded
        with torch.set_grad_enabled(enabled):
            for tokens in (1, 20):
                net(x[:, :tokens])
                plain = net.base_model.model.linear.base_layer
                assert torch.equal(
                    kept[-1], nn.functional.linear(x[:, :tokens], plain.weight, plain.bias)
                )


# What is kept for the backward


def kept_bytes(net: nn.Module, x: Tensor) -> int:
    """Bytes of the storages that the graph keeps, parameters excluded."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x)
    return sum(found.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_what_lora_keeps(dtype, dropout):
    """x and z, and the router's decision; with dropout a mask; x in its own dtype."""
    width, tokens = 1024, 64
    nets = {}
    for name, config in {
        "ours": MoeLoraConfig(
            r=4, num_experts=20, top_k=10, lora_dropout=dropout, target_modules=["linear"]
        ),
        "lora": LoraConfig(r=80, lora_dropout=dropout, target_modules=["linear"]),
    }.items():
        net = Net()
        net.linear = nn.Linear(width, width, dtype=dtype).requires_grad_(False)
        nets[name] = get_peft_model(net, config).train()  # fp32 adapters on any base
    x = torch.randn(1, tokens, width, dtype=dtype, requires_grad=True)
    ours, lora = (kept_bytes(net, x) for net in nets.values())
    x_bytes, z_bytes = tokens * width * x.element_size(), tokens * 80 * 4
    mask = tokens * width if dropout else 0
    # Logits (20) beside z, gates (20), shares (10) in fp32, and ids (10) in int64.
    assert ours <= x_bytes + mask + z_bytes + tokens * (20 * 4 + 20 * 4 + 10 * 4 + 10 * 8)
    assert ours <= 1.08 * lora  # at twice this width 1.05


# Decoding

DECODED = {
    "one token": {},
    "rank": {"r": 1},
    "rslora": {"use_rslora": True},
}


@pytest.mark.parametrize("keys", DECODED.values(), ids=DECODED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_decoded_token_gets_the_numbers_of_the_layer_s_own_pass(keys, dtype, monkeypatch):
    net = adapted(dtype, **keys).eval()
    x = torch.randn(2, 3, WIDTH, dtype=dtype)
    calls = []
    own = Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda *a: calls.append(own(*a)) or calls[-1])
    with torch.no_grad():
        decoded = net(x)
        assert len(calls) == 1
        assert calls[0] is not None
        monkeypatch.setattr(decoder, "_MOST_TOKENS", 0)
        assert torch.equal(decoded, net(x))
        assert calls[1] is None


NOT_DECODED = {
    "hydralora": {"expert": "shared_a"},
    "softmax": {"router": "softmax"},
    "modifiers": {"router_modifiers": {"temperature": 2.0}},
    "bias": {"router_score_kwargs": {"bias": True}},
    "sequence": {"router_input": "sequence"},
    "universal": {"universal_expert": "one"},
    "offset": {"init": "pissa"},
    "one expert": {"num_experts": 1, "top_k": 1},
    "not renormalised": {"router_kwargs": {"renormalize": False}},
    "noisy": {"router": "noisy_topk"},
}


@pytest.mark.parametrize("keys", NOT_DECODED.values(), ids=NOT_DECODED)
def test_other_adapters_take_the_layer_s_own_pass(keys):
    layer = adapted(**keys).eval().base_model.model.linear
    assert Decoder.of(layer, "default") is None


def test_recording_sees_decoded_tokens_too():
    model = adapted_llama()
    layer = next(iter(moelora_layers(model).values()))
    layer.record_routing = True
    with torch.no_grad():
        model(input_ids=sentences(1, 1))
    assert layer.last_routing["default"].weights.shape == (1, 4)


def test_an_adapter_that_is_added_anew_is_decoded_anew():
    net = adapted().eval()
    layer, x = net.base_model.model.linear, torch.randn(1, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        net(x)
        first = layer.moelora_decoder["default"]
        net.delete_adapter("default")
        assert "default" not in layer.moelora_decoder
        config = MoeLoraConfig(r=4, num_experts=3, top_k=1, target_modules=["linear"])
        net.add_adapter("default", config)
        net.set_adapter("default")
        net.double().eval()(x)
    assert layer.moelora_decoder["default"] is not first
