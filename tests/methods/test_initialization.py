"""Initial values and scales of the experts, and the offset that keeps the base's output."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import tiny_llama
from torch import nn

from moelora_plugin import MoeLoraConfig
from moelora_plugin.errors import ConfigError
from moelora_plugin.experts import EXPERTS
from moelora_plugin.initialization import INITIALIZATIONS
from moelora_plugin.model import moelora_layers
from moelora_plugin.ops.reference import svd_updates_loop
from moelora_plugin.scaling import scale_of
from moelora_plugin.types import LayerPlan

D_IN, D_OUT = 14, 12
NUM_EXPERTS, RANK = 3, 2
SVD = ["pissa", "milora", "segments"]

# Which singular components, of 12, the experts start from, with 3 experts of rank 2.
COMPONENTS = {
    "pissa": [(0, 1), (2, 3), (4, 5)],
    "milora": [(6, 7), (8, 9), (10, 11)],
    "segments": [(0, 1), (4, 5), (8, 9)],
}
DEFAULT_RHO = {"pissa": 1.0, "milora": 1.0, "segments": 10.0}


def config_for(init: str, **keys) -> MoeLoraConfig:
    defaults = {
        "num_experts": NUM_EXPERTS,
        "top_k": 2,
        "r": RANK,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
    }
    return MoeLoraConfig(**{"target_modules": ["0"], "init": init, **defaults, **keys})


def adapted(init: str, dtype=torch.float64, **keys) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D_IN, D_OUT)).to(dtype)
    torch.set_default_dtype(dtype)
    try:
        get_peft_model(net, config_for(init, **keys), autocast_adapter_dtype=False)
    finally:
        torch.set_default_dtype(torch.float32)
    return net


def same_gates(net):
    """A router that finds all experts alike."""
    for layer in moelora_layers(net).values():
        layer.router_weights().zero_()
    return net


# Sums of a dozen products in float64.
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


@pytest.mark.parametrize("name", SVD)
@pytest.mark.parametrize("rho", [None, 2.5])
def test_experts_are_singular_components_over_rho(name, rho):
    kwargs = {} if rho is None else {"rho": rho}
    layer = adapted(name, init_kwargs=kwargs)[0]
    weight = layer.base_layer.weight.detach()
    rho = DEFAULT_RHO[name] if rho is None else rho
    expected = svd_updates_loop(weight, COMPONENTS[name], rho)
    scaling = 6 / RANK
    for (a, b), update in zip(layer.expert_weights(), expected, strict=True):
        torch.testing.assert_close(scaling * b @ a, update, **CLOSE)
        # The singular values are shared evenly: A A^T = B^T B, diagonal.
        torch.testing.assert_close(a @ a.T, b.T @ b, **CLOSE)
        torch.testing.assert_close(a @ a.T, torch.diag((a @ a.T).diag()), **CLOSE)


@pytest.mark.parametrize("name", SVD)
@pytest.mark.parametrize("init_cof", [None, 0.0, 1.0])
def test_the_offset_is_the_experts_times_the_coefficient(name, init_cof):
    layer = adapted(name, init_kwargs={"init_cof": init_cof})[0]
    expected = sum(svd_updates_loop(layer.base_layer.weight.detach(), COMPONENTS[name], 1.0))
    expected = expected / DEFAULT_RHO[name] * (1 / NUM_EXPERTS if init_cof is None else init_cof)
    tensors = layer.tensors()
    torch.testing.assert_close(tensors["offset_B"] @ tensors["offset_A"], expected, **CLOSE)
    assert not any(p.requires_grad for key, p in layer.named_parameters() if "offset" in key)


@pytest.mark.parametrize("name", SVD)
def test_ranks_may_differ(name):
    ranks = {"0": [1, 3, 2]}
    layer = adapted(name, allocation="pattern", allocation_kwargs={"r": ranks})[0]
    components = {
        "pissa": [(0,), (1, 2, 3), (4, 5)],
        "milora": [(6,), (7, 8, 9), (10, 11)],
        "segments": [(0,), (4, 5, 6), (8, 9)],
    }[name]
    expected = svd_updates_loop(layer.base_layer.weight.detach(), components, DEFAULT_RHO[name])
    for (a, b), update in zip(layer.expert_weights(), expected, strict=True):
        torch.testing.assert_close(3.0 * b @ a, update, **CLOSE)  # alpha 6 over the mean rank 2


@pytest.mark.parametrize("name", SVD)
@pytest.mark.parametrize(
    "keys",
    [
        {"num_experts": 1, "top_k": 1},
        {"top_k": NUM_EXPERTS},
        {"router": "softmax"},
        {"top_k": NUM_EXPERTS, "scale": "goat"},
        {"top_k": NUM_EXPERTS, "use_rslora": True},
        {"top_k": NUM_EXPERTS, "total_rank": True, "r": 6},
    ],
    ids=str,
)
def test_with_equal_gates_the_adapted_model_starts_as_the_base(name, keys):
    net = same_gates(adapted(name, **keys))
    x = torch.randn(5, D_IN, dtype=torch.float64)
    torch.testing.assert_close(net(x), net[0].base_layer(x), **CLOSE)
    assert all(a.any() and b.any() for a, b in net[0].expert_weights())


@pytest.mark.parametrize("name", SVD)
@pytest.mark.parametrize("top_k", [1, 2])
def test_with_top_k_the_expected_output_is_the_base_s(name, top_k):
    """Over all selections of k of N, each with gates 1/k, as a router without preference has."""
    layer = adapted(name, top_k=top_k)[0]
    selections = list(itertools.combinations(range(NUM_EXPERTS), top_k))
    updates = []
    for chosen in selections:
        gates = torch.zeros(NUM_EXPERTS, dtype=torch.float64)
        gates[list(chosen)] = 1 / top_k
        updates.append(layer.static_update(weights_E=gates))
    largest = max(update.abs().max() for update in updates)
    assert largest > 1e-3  # a selection alone does change the output
    assert (sum(updates) / len(updates)).abs().max() < 1e-12 * max(largest, 1)


@pytest.mark.parametrize("name", ["kaiming", "gaussian"])
def test_with_b_zero_the_adapted_model_is_the_base_bit_for_bit(name):
    net = adapted(name, dtype=torch.float32)
    x = torch.randn(5, D_IN)
    assert torch.equal(net(x), net[0].base_layer(x))


def test_gaussian_draws_with_its_deviations():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(500, 400))
    get_peft_model(net, config_for("gaussian", init_kwargs={"std": 0.3, "std_b": 0.1}, r=8))
    tensors = net[0].tensors()
    # About ten thousand draws: a relative standard error below 1 %.
    assert tensors["A"].std().item() == pytest.approx(0.3, rel=0.04)
    assert tensors["B"].std().item() == pytest.approx(0.1, rel=0.04)
    assert adapted("gaussian")[0].tensors()["A"].std().item() == pytest.approx(0.02, rel=0.3)


def test_a_randomised_svd_finds_the_largest_components():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48))
    left, right = (torch.linalg.qr(torch.randn(n, 10))[0] for n in (48, 64))
    spectrum = 2.0 ** -torch.arange(10)  # falls fast, as what the iteration is good at
    net[0].weight.data = left @ torch.diag(spectrum) @ right.T
    exact = copy.deepcopy(net)
    get_peft_model(exact, config_for("pissa"))
    get_peft_model(net, config_for("pissa", init_kwargs={"niter": 16}))
    for (a, b), (a2, b2) in zip(net[0].expert_weights(), exact[0].expert_weights(), strict=True):
        torch.testing.assert_close(b @ a, b2 @ a2, rtol=1e-4, atol=1e-5)  # float32, sign-free


@pytest.mark.parametrize("name", sorted(INITIALIZATIONS.keys() - {"adapters"}))
def test_the_base_s_weights_stay_and_disabling_gives_the_base(name):
    base = tiny_llama(vocab_size=64)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    inputs = torch.arange(12).view(2, 6)
    expected = base(inputs).logits
    model = get_peft_model(base, config_for(name, target_modules=["q_proj", "down_proj"]))
    with model.disable_adapter():
        assert torch.equal(model(inputs).logits, expected)
    after = {key.replace(".base_layer", ""): value for key, value in base.state_dict().items()}
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", sorted(INITIALIZATIONS.keys() - {"adapters"}))
@pytest.mark.parametrize(("low_cpu_mem_usage", "is_trainable"), [(False, False), (True, True)])
def test_save_and_load_are_bitwise(tmp_path, name, low_cpu_mem_usage, is_trainable):
    config = config_for(name, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(vocab_size=64), config)
    inputs = torch.arange(12).view(2, 6)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(input_ids=inputs, labels=inputs).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_llama(vocab_size=64),
        tmp_path,
        is_trainable=is_trainable,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    adapter = {key: value for key, value in model.state_dict().items() if "moelora_" in key}
    found = loaded.state_dict()
    assert any("offset_A" in key for key in adapter) == (name in SVD)
    assert all(torch.equal(found[key], value) for key, value in adapter.items())
    assert torch.equal(model.eval()(inputs).logits, loaded.eval()(inputs).logits)


@pytest.mark.parametrize("name", SVD)
def test_training_leaves_the_offset_alone(name):
    net = adapted(name)
    before = {key: value.clone() for key, value in net[0].tensors().items()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net(torch.randn(4, D_IN, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    moved = {k for k, v in net[0].tensors().items() if not torch.equal(v, before[k])}
    assert moved == {"A", "B"}


@pytest.mark.parametrize("name", SVD)
def test_a_quantised_base_is_refused(name):
    net = nn.Sequential(nn.Linear(D_IN, D_OUT))
    net[0].weight = nn.Parameter(torch.ones(D_OUT, D_IN, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        ConfigError, match="quantised; load the base in a floating-point dtype and whole"
    ):
        get_peft_model(net, config_for(name))


# Mixed factors are no sum of the experts' own updates, which the offset cannot know.
@pytest.mark.parametrize("expert", sorted(EXPERTS.keys() - {"mixed_factors"}))
def test_an_expert_kind_starts_as_the_base_or_is_refused(expert):
    net = nn.Sequential(nn.Linear(12, 12))
    keys = {"expert": expert, "num_experts": 4, "top_k": 4, "r": 1}
    if expert not in {"lora", "rank"}:
        with pytest.raises(ConfigError, match="set expert to 'lora', or init to 'kaiming'"):
            config_for("pissa", **keys)
        return
    config = config_for("pissa", **keys)
    get_peft_model(net, config)
    x = torch.randn(5, 12)
    # float32 products of numbers around 1.
    torch.testing.assert_close(same_gates(net)(x), net[0].base_layer(x), rtol=1e-5, atol=1e-5)


def test_loading_an_adapter_decomposes_nothing(tmp_path, monkeypatch):
    config = config_for("segments", target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(vocab_size=64), config).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.linalg, "svd", None)
    for keys in ({}, {"low_cpu_mem_usage": True, "is_trainable": True}):
        PeftModel.from_pretrained(tiny_llama(vocab_size=64), tmp_path, **keys)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("gaussian", {"init_kwargs": {"std": 0}}, r"init_kwargs\['std'\]=0 must be a number above"),
        ("gaussian", {"init_kwargs": {"std_b": -1}}, r"init_kwargs\['std_b'\]=-1 must be a number"),
        ("pissa", {"init_kwargs": {"rho": 0}}, r"init_kwargs\['rho'\]=0 must be a number above 0"),
        ("pissa", {"init_kwargs": {"niter": 0}}, r"init_kwargs\['niter'\]=0 must be at least 1"),
        ("milora", {"init_kwargs": {"init_cof": -1}}, r"init_kwargs\['init_cof'\]=-1 must be at"),
        ("milora", {"init_kwargs": {"niter": 4}}, "init_kwargs has no key 'niter'"),
        ("pissa", {"r": 5}, "0 has 12 singular components, fewer than the experts' total rank 15"),
        (
            "segments",
            {"allocation": "pattern", "allocation_kwargs": {"r": {"0": [1, 5, 1]}}},
            "gives each of 3 experts 4 of 12 singular components, fewer than the rank 5",
        ),
    ],
)
def test_errors_name_the_key(name, keys, message):
    with pytest.raises(ConfigError, match=message):
        adapted(name, **keys)


# Scale --------------------------------------------------------------------------------------------

PLAN = LayerPlan(num_experts=4, top_k=2, ranks=(2,) * 4, alpha=6)
SPLIT = LayerPlan(num_experts=4, top_k=2, ranks=(2,) * 4, alpha=6, scale_rank=8)
UNEQUAL = LayerPlan(num_experts=2, top_k=1, ranks=(1, 3), alpha=6)


@pytest.mark.parametrize(
    ("keys", "plan", "expected"),
    [
        ({}, PLAN, 3.0),
        ({}, SPLIT, 0.75),  # with total_rank the r of alpha / r is the rank of all
        ({}, UNEQUAL, 3.0),  # the mean rank
        ({"use_rslora": True}, PLAN, 6 / math.sqrt(2)),
        ({"use_rslora": True}, SPLIT, 6 / math.sqrt(8)),
        ({"scale": "constant"}, PLAN, 6.0),
        # sqrt(3 eta d / r): d the layer's inputs, r one expert's rank, even where r was split.
        ({"scale": "goat"}, PLAN, math.sqrt(3 * 6 * 100 / 2)),
        ({"scale": "goat"}, SPLIT, math.sqrt(3 * 6 * 100 / 2)),
    ],
)
def test_scales_by_hand(keys, plan, expected):
    assert scale_of(MoeLoraConfig(**keys), plan, 100) == pytest.approx(expected, rel=1e-12)


def test_goat_s_own_numbers():
    """r = 32 split over 8 experts, eta 1, d = 4096: s = sqrt(3 * 4096 / 4)."""
    config = MoeLoraConfig(
        num_experts=8, top_k=2, r=32, lora_alpha=1, total_rank=True, scale="goat"
    )
    net = nn.Sequential(nn.Linear(4096, 8))
    config.target_modules = ["0"]
    get_peft_model(net, config)
    assert net[0].moelora_mixture["default"].scaling == pytest.approx(math.sqrt(3 * 1024))
