"""`site_kwargs["share"]`: one router for target modules that read the same input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapted_llama import checkpoint_activations
from peft import PeftModel, get_peft_model
from tiny import tiny_llama
from torch import nn

from moelora_plugin import MoeLoraConfig
from moelora_plugin.errors import ConfigError, ExportError
from moelora_plugin.model import moelora_layers, routed_layers

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
FOLLOWERS = {"q_proj": ["k_proj", "v_proj"], "gate_proj": ["up_proj"]}
IDS = torch.arange(24).view(2, 12) % 30


def adapted(share: Any = (("q_proj", "[kv]_proj"), ("gate_proj", "up_proj")), **keys: Any) -> Any:
    torch.manual_seed(0)
    base = tiny_llama().double()
    config = MoeLoraConfig(
        r=2,
        num_experts=4,
        top_k=2,
        lora_dropout=0.0,
        target_modules=TARGETS,
        site_kwargs={"share": share},
        gate_rescale="sqrt",
        **keys,
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    torch.manual_seed(1)
    for layer in moelora_layers(model).values():
        for a, b in layer.expert_weights():
            a.normal_(std=0.3)
            b.normal_(std=0.3)
    return model


def own_routers(shared: nn.Module) -> nn.Module:
    """The same experts with a router each, followers having their owner's weights."""
    model = adapted(share=())
    for name, layer in moelora_layers(model).items():
        twin = shared.get_submodule(name)
        for mine, theirs in zip(layer.expert_weights(), twin.expert_weights(), strict=True):
            mine[0].copy_(theirs[0])
            mine[1].copy_(theirs[1])
        parent, _, last = name.rpartition(".")
        owner = next((o for o, fs in FOLLOWERS.items() if last in fs), last)
        layer.router_weights().copy_(shared.get_submodule(f"{parent}.{owner}").router_weights())
    return model


def gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(input_ids=IDS).logits
    logits.square().sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_it_computes_what_equal_routers_compute_and_its_gate_learns_from_all():
    model = adapted()
    logits, grads = gradients(model)
    expected, apart = gradients(own_routers(model))
    # Sums over the followers in another order, on numbers up to a hundred.
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(logits, expected, **close)
    gates = {name for name in grads if "moelora_gate" in name}
    assert {name.split(".")[-4] for name in gates} == {"q_proj", "o_proj", "gate_proj"}
    for name, grad in grads.items():
        total = apart[name]
        if name in gates:
            owner = name.split(".")[-4]
            followers = FOLLOWERS.get(owner, [])
            total = total + sum(apart[name.replace(owner, other)] for other in followers)
        torch.testing.assert_close(grad, total, **close, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(use_reentrant):
    model = adapted().train()
    _, expected = gradients(model)
    checkpoint_activations(model, use_reentrant)
    _, grads = gradients(model)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-12, atol=1e-12)


def test_it_is_saved_loaded_and_copied_bitwise(tmp_path):
    model = adapted().eval()
    expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(tiny_llama().double(), tmp_path).eval()
    for layer in routed_layers(loaded).values():
        layer.double()
    assert torch.equal(loaded(input_ids=IDS).logits, expected)
    assert torch.equal(copy.deepcopy(model)(input_ids=IDS).logits, expected)


def test_a_generated_token_follows_its_owner():
    model = adapted().eval()
    cached = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(
        cached, model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, use_cache=False)
    )


def test_static_gates_merge_and_others_do_not():
    with pytest.raises(ExportError, match="follow the input"):
        adapted().merge_adapter()
    model = adapted(router="softmax", router_score="static", router_input="none").eval()
    for layer in routed_layers(model).values():
        for parameter in layer.moelora_gate.parameters():
            parameter.data.normal_()
    expected = model(input_ids=IDS).logits
    model.merge_adapter()
    # Some hundred roundings of numbers of order ten.
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-11, atol=1e-11)


def test_a_follower_that_runs_first_is_named():
    with pytest.raises(ConfigError, match=r"ran before .*up_proj"):
        adapted(share=[["up_proj", "gate_proj"]])(input_ids=IDS)


@pytest.mark.parametrize(
    ("share", "says"),
    [
        ("q_proj", "list of lists"),
        (["q_proj", "k_proj"], "list of lists"),
        (["("], "list of lists"),
        ([["q_proj", "missing"]], "no two target modules"),
    ],
)
def test_bad_values_name_the_key(share, says):
    with pytest.raises(ConfigError, match=rf"site_kwargs\['share'\].*{says}"):
        adapted(share=share)
