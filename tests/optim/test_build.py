"""build_optimizer: names, parameter groups, and the gate rescaling it settles."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llama
from torch import nn

from moelora_plugin import MoeLoraConfig, RiemannianAdamW, RiemannianSGD, build_optimizer
from moelora_plugin.errors import ConfigError
from moelora_plugin.model import moelora_layers
from moelora_plugin.optim import OPTIMIZERS


def mixture(**keys):
    defaults = {"r": 2, "num_experts": 3, "top_k": 2, "target_modules": ["q_proj", "v_proj"]}
    return get_peft_model(tiny_llama(hidden=16), MoeLoraConfig(**{**defaults, **keys}))


def with_biases(bias: str):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    config = MoeLoraConfig(
        r=2, num_experts=3, top_k=2, target_modules=["0"], modules_to_save=["2"], bias=bias
    )
    return get_peft_model(net, config)


def names_of(model, group) -> list[str]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    return [by_id[id(p)].partition("base_model.model.")[2] for p in group["params"]]


def step(model, optimizer, gate_scale: float = 1.0):
    ids = torch.arange(3, 19).view(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    for layer in moelora_layers(model).values():
        layer.moelora_gate["default"].weight.grad.mul_(gate_scale)
    optimizer.step()


@pytest.mark.parametrize(
    ("name", "kind", "mode"),
    [
        ("rsgd", RiemannianSGD, "none"),
        ("grsgd", RiemannianSGD, "sqrt"),
        ("radamw", RiemannianAdamW, "none"),
        ("gradamw", RiemannianAdamW, "sqrt"),
    ],
)
def test_the_four_names(name, kind, mode, tmp_path):
    model = mixture()
    optimizer = build_optimizer(model, name)
    assert type(optimizer) is kind
    layers = moelora_layers(model).values()
    assert {layer.moelora_gate_rescale["default"] for layer in layers} == {mode}
    # The adapter remembers what it was trained with.
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["gate_rescale"] == mode


def test_every_name_is_tested():
    assert set(OPTIMIZERS) == {"rsgd", "grsgd", "radamw", "gradamw"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gradam", "Unknown optimizer 'gradam'; did you mean 'gradamw' or 'radamw' or 'grsgd'?"),
        ("zzz", "Unknown optimizer 'zzz'; known are gradamw, grsgd, radamw, rsgd."),
    ],
)
def test_an_unknown_name_offers_the_nearest(name, message):
    with pytest.raises(ConfigError) as caught:
        build_optimizer(mixture(), name)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "explicit"), [("gradamw", "exact"), ("grsgd", "none"), ("radamw", "sqrt")]
)
def test_an_explicit_mode_wins_and_is_pointed_out(name, explicit):
    model = mixture(gate_rescale=explicit)
    with pytest.warns(
        UserWarning, match=f"adapter 'default' says '{explicit}', which is used"
    ) as seen:
        build_optimizer(model, name)
    assert seen[0].filename == __file__  # where the user called it
    assert model.peft_config["default"].gate_rescale == explicit
    for layer in moelora_layers(model).values():
        assert layer.moelora_gate_rescale["default"] == explicit


def test_auto_is_settled_anew_by_every_optimizer(tmp_path):
    model = mixture()
    for name, mode in (("gradamw", "sqrt"), ("rsgd", "none"), ("grsgd", "sqrt")):
        build_optimizer(model, name)  # warnings are errors here
        assert model.peft_config["default"].gate_rescale == "auto"  # what was asked for
        assert model.peft_config["default"].to_dict()["gate_rescale"] == mode
        for layer in moelora_layers(model).values():
            assert layer.moelora_gate_rescale["default"] == mode
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["gate_rescale"] == "sqrt"
    # What a file or a caller names is explicit.
    model.peft_config["default"].gate_rescale = "exact"
    with pytest.warns(UserWarning, match="adapter 'default' says 'exact', which is used"):
        build_optimizer(model, "gradamw")
    for layer in moelora_layers(model).values():
        assert layer.moelora_gate_rescale["default"] == "exact"
    loaded = PeftModel.from_pretrained(tiny_llama(hidden=16), tmp_path, is_trainable=True)
    with pytest.warns(UserWarning, match="adapter 'default' says 'sqrt', which is used"):
        build_optimizer(loaded, "radamw")


def test_an_explicit_mode_that_the_name_stands_for_needs_no_warning():
    build_optimizer(mixture(gate_rescale="sqrt"), "gradamw")  # warnings are errors here


def test_only_the_active_adapter_is_settled_and_trained():
    model = mixture()
    model.add_adapter("second", MoeLoraConfig(num_experts=2, top_k=1, target_modules=["q_proj"]))
    optimizer = build_optimizer(model, "gradamw")
    assert model.peft_config["default"].gate_rescale_used == "sqrt"
    assert model.peft_config["second"].gate_rescale_used is None
    assert not [
        n for group in optimizer.param_groups for n in names_of(model, group) if "second" in n
    ]


@pytest.mark.parametrize("key", ["lr", "gate_lr"])
@pytest.mark.parametrize("rate", [-1e-4, float("inf"), float("nan")])
def test_a_rate_must_be_a_number(key, rate):
    with pytest.raises(ConfigError, match=f"^{key}=.* must be a number of at least 0"):
        build_optimizer(mixture(), "radamw", **{key: rate})


def test_the_groups_and_their_roles():
    model = with_biases("all")
    optimizer = build_optimizer(
        model, "gradamw", lr=0.1, gate_lr=0.01, weight_decay=0.5, gate_max_grad_norm=0.7
    )
    roles = [group["role"] for group in optimizer.param_groups]
    assert roles == ["experts", "gates", "other", "other"]
    experts, gates, weights, biases = optimizer.param_groups
    assert names_of(model, experts) == ["0.moelora_A.default.weight", "0.moelora_B.default.weight"]
    assert names_of(model, gates) == ["0.moelora_gate.default.weight"]
    assert names_of(model, weights) == ["2.modules_to_save.default.weight"]
    assert set(names_of(model, biases)) >= {
        "0.base_layer.bias",
        "1.bias",
        "2.modules_to_save.default.bias",
    }
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01, 0.1, 0.1]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0, 0.5, 0.0]
    assert experts["ranks"] == [[2, 2, 2]]
    assert experts["scalings"] == [8.0]  # alpha 16 / r 2
    assert gates["max_grad_norm"] == 0.7
    everything = {id(p) for p in model.parameters() if p.requires_grad}
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == everything


@pytest.mark.parametrize("name", ["rsgd", "radamw"])
def test_weight_decay_pulls_experts_and_weights_but_not_gates_and_biases(name):
    model = with_biases("moelora_only")
    optimizer = build_optimizer(model, name, lr=0.1, gate_lr=0.1, weight_decay=0.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    for n, p in model.named_parameters():
        if "moelora_B" in n or not p.requires_grad:
            continue  # B is zero: decay leaves it
        decayed = "moelora_A" in n or n.endswith("modules_to_save.default.weight")
        expected = before[n] * (1 - 0.1 * 0.5) if decayed else before[n]
        torch.testing.assert_close(p.detach(), expected, msg=n)


def test_gates_are_clipped_together():
    """As clip_grad_norm_ over the gates of all layers at once; the experts are not clipped."""
    steps = []
    for by_hand in (False, True):
        model = mixture(lora_dropout=0.0)
        torch.manual_seed(1)
        for layer in moelora_layers(model).values():
            for _, b in layer.expert_weights():
                b.normal_()
        optimizer = build_optimizer(
            model, "rsgd", lr=0.0, gate_lr=1.0, gate_max_grad_norm=None if by_hand else 0.25
        )
        gates = optimizer.param_groups[1]["params"]
        before = [p.detach().clone() for p in gates]
        ids = torch.arange(3, 19).view(2, 8)
        model(input_ids=ids, labels=ids).loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in gates])
        for p in gates:
            p.grad.mul_(10 / norm)  # far above the limit
        if by_hand:
            torch.nn.utils.clip_grad_norm_(gates, 0.25)
        optimizer.step()
        steps.append([old - new.detach() for old, new in zip(before, gates, strict=True)])
    assert len(steps[0]) == 4
    joint = torch.nn.utils.get_total_norm(steps[0])
    assert abs(joint - 0.25) < 1e-5  # of fp32 differences
    for clipped, expected in zip(*steps, strict=True):
        torch.testing.assert_close(clipped, expected)


def test_gates_below_the_limit_are_not_touched():
    moved = []
    for limit in (None, 1e6):
        model = mixture(lora_dropout=0.0)
        optimizer = build_optimizer(model, "rsgd", gate_lr=1.0, gate_max_grad_norm=limit)
        step(model, optimizer)
        moved.append([p.detach() for p in optimizer.param_groups[1]["params"]])
    assert all(torch.equal(a, b) for a, b in zip(*moved, strict=True))


def test_plain_lora_is_taken_as_single_experts():
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], use_rslora=True)
    model = get_peft_model(tiny_llama(hidden=16), config)
    optimizer = build_optimizer(model, "rsgd", lr=0.1)
    (experts,) = optimizer.param_groups
    assert experts["ranks"] == [[3], [3]]
    assert experts["scalings"] == [6 / 3**0.5] * 2
    assert [name.rsplit(".", 3)[1] for name in names_of(model, experts)] == ["lora_A", "lora_B"] * 2


def test_a_model_with_nothing_to_train_is_refused():
    message = "^The model has no trainable LoRA experts; add an adapter first"
    with pytest.raises(ConfigError, match=message):
        build_optimizer(nn.Linear(2, 2), "rsgd")
    model = mixture()
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match=message):
        build_optimizer(model, "rsgd")


@pytest.mark.parametrize("frozen", ["moelora_A", "moelora_B"])
def test_a_factor_whose_partner_is_frozen_is_refused(frozen):
    model = mixture()
    name, layer = next(iter(moelora_layers(model).items()))
    getattr(layer, frozen)["default"].requires_grad_(False)
    left = {"moelora_A": "moelora_B", "moelora_B": "moelora_A"}[frozen]
    with pytest.raises(ConfigError) as caught:
        build_optimizer(model, "rsgd")
    assert str(caught.value) == (
        f"{name}.{left}.default.weight trains but its partner does not, so it has no Riemannian "
        "metric; set requires_grad alike on A and B of an adapter."
    )


def test_frozen_gates_make_no_group():
    model = mixture()
    for layer in moelora_layers(model).values():
        layer.moelora_gate.requires_grad_(False)
    assert [group["role"] for group in build_optimizer(model, "rsgd").param_groups] == ["experts"]
