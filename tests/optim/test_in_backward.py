"""Preconditioning in the backward: any optimizer sees what ours would have computed in its step."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from moelora_plugin import MoeLoraConfig, build_optimizer
from moelora_plugin.errors import ConfigError
from moelora_plugin.model import moelora_layers
from moelora_plugin.optim import OPTIMIZERS, precondition_in_backward
from moelora_plugin.types import LayerPlan

# The same products, but each gradient is preconditioned for itself instead of their sum.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
OPTIONS = {"lr": 0.02, "gate_lr": 0.05, "gate_max_grad_norm": None, "damping": 1e-2}


def unequal_ranks(config: MoeLoraConfig, module_name: str) -> LayerPlan:
    return LayerPlan(num_experts=3, top_k=2, ranks=(1, 3, 2), alpha=4.0)


class Net(nn.Module):
    def __init__(self, checkpointing: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5)
        self.checkpointing = checkpointing

    def forward(self, x):
        if self.checkpointing == "none":
            return self.down(torch.tanh(self.up(x)))
        return checkpoint(
            lambda x: self.down(torch.tanh(self.up(x))),
            x.requires_grad_(),
            use_reentrant=self.checkpointing == "reentrant",
        )


def model_of(kind: str = "mixture", checkpointing: str = "none", dtype=torch.float64):
    torch.manual_seed(0)
    net = Net(checkpointing).to(dtype)
    if kind == "lora":
        config = LoraConfig(r=3, lora_alpha=6, target_modules=["up", "down"])
    else:
        config = MoeLoraConfig(
            num_experts=3,
            top_k=2,
            lora_dropout=0.0,
            target_modules=["up", "down"],
            allocation=f"{__name__}.unequal_ranks",
        )
    model = get_peft_model(net, config)
    for name, parameter in model.named_parameters():
        if "_B." in name:
            parameter.data.normal_()
    return model


def loss_of(model, seed: int) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 6, dtype=dtype, generator=generator)
    return (model(x) - torch.randn(16, 5, dtype=dtype, generator=generator)).square().mean()


def trained(model, optimizer, accumulation: int = 1, updates: int = 3):
    for update in range(updates):
        optimizer.zero_grad()
        for i in range(accumulation):
            (loss_of(model, update * accumulation + i) / accumulation).backward()
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def assert_close(found, expected, tolerance=CLOSE):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", ["mixture", "lora"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_optimizer_of_ours(name, accumulation, kind):
    options = {**OPTIONS, "scale_compensation": True, "lora_plus_ratio": 4.0, "weight_decay": 0.1}
    ours = model_of(kind)
    expected = trained(ours, build_optimizer(ours, name, **options), accumulation)
    model = model_of(kind)
    optimizer = build_optimizer(model, name, in_backward=True, **options)
    assert type(optimizer) in (torch.optim.SGD, torch.optim.AdamW)
    assert_close(trained(model, optimizer, accumulation), expected)


@pytest.mark.parametrize("checkpointing", ["reentrant", "not reentrant"])
def test_under_activation_checkpointing(checkpointing):
    ours = model_of()
    expected = trained(ours, build_optimizer(ours, "gradamw", **OPTIONS), 3)
    model = model_of(checkpointing=checkpointing)
    optimizer = build_optimizer(model, "gradamw", in_backward=True, **OPTIONS)
    assert_close(trained(model, optimizer, 3), expected)


def test_any_optimizer_will_do_and_remove_gives_the_ordinary_gradients_back():
    ours, model, plain = model_of(), model_of(), model_of()
    expected = trained(ours, build_optimizer(ours, "radamw", eps=1e-8, **OPTIONS))
    handle = precondition_in_backward(model, damping=1e-2)
    gates = [layer.moelora_gate["default"].weight for layer in moelora_layers(model).values()]
    others = [p for p in model.parameters() if p.requires_grad and all(p is not g for g in gates)]
    groups = [{"params": others}, {"params": gates, "lr": 0.05}]
    assert_close(trained(model, torch.optim.AdamW(groups, lr=0.02, weight_decay=0.0)), expected)

    handle.remove()
    handle.remove()
    plain.load_state_dict(model.state_dict())
    for each in (model, plain):
        each.zero_grad()
        loss_of(each, 7).backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)


def test_a_weight_changed_by_hand_counts_in_the_next_backward():
    """Engines write into flat buffers that a parameter's version does not know."""
    model, fresh = model_of(), model_of()
    precondition_in_backward(model, damping=1e-2)
    loss_of(model, 0).backward()
    model.zero_grad()
    for each in (model, fresh):
        for parameter in each.parameters():
            parameter.data.mul_(1.5)
    precondition_in_backward(fresh, damping=1e-2)
    for each in (model, fresh):
        loss_of(each, 1).backward()
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert a.grad is None or torch.equal(a.grad, b.grad)


def test_a_loss_scale_passes_through():
    """A power of two, so to the bit."""
    plain, scaled = model_of(dtype=torch.float32), model_of(dtype=torch.float32)
    options = {**OPTIONS, "in_backward": True}
    optimizer = build_optimizer(plain, "gradamw", **options)
    behind_scaler = build_optimizer(scaled, "gradamw", **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(plain, step).backward()
        optimizer.step()
        behind_scaler.zero_grad()
        scaler.scale(loss_of(scaled, step)).backward()
        scaler.step(behind_scaler)
        scaler.update()
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_backward_inside_autocast_keeps_the_metrics_in_full_precision():
    grads = []
    for inside in (False, True):
        model = model_of(dtype=torch.float32)
        precondition_in_backward(model, damping=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_further_optimizer_starts_over():
    """Never preconditioned twice, whichever way comes second."""
    for in_backward in (False, True):
        model, expected = model_of(), model_of()
        build_optimizer(model, "gradamw", in_backward=True, **OPTIONS)
        precondition_in_backward(model, damping=0.5)
        second = build_optimizer(model, "gradamw", in_backward=in_backward, **OPTIONS)
        reference = build_optimizer(expected, "gradamw", **OPTIONS)
        assert_close(trained(model, second), trained(expected, reference))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_no_hooks_and_says_so_when_it_trains(copied):
    model = model_of()
    precondition_in_backward(model)
    twin = copied(model)
    with torch.no_grad():
        loss_of(twin, 0)
    twin.eval()
    loss_of(twin, 0)
    twin.train()
    with pytest.raises(ConfigError, match="after precondition_in_backward"):
        loss_of(twin, 0)
    precondition_in_backward(twin)
    loss_of(twin, 0).backward()


def test_an_adapter_added_later_is_missed():
    model = model_of()
    precondition_in_backward(model)
    model.add_adapter("second", MoeLoraConfig(num_experts=2, top_k=1, target_modules=["up"]))
    model.set_adapter("second")
    with pytest.raises(ConfigError, match="replaced, added or partitioned"):
        loss_of(model.double(), 0)


def test_the_model_can_be_collected():
    model = model_of()
    precondition_in_backward(model)
    factor = weakref.ref(next(iter(moelora_layers(model).values())).moelora_A["default"].weight)
    del model
    gc.collect()
    assert factor() is None


def test_nan_weights_stop_the_run():
    model = model_of()
    precondition_in_backward(model)
    next(iter(moelora_layers(model).values())).moelora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="An expert's weights are NaN or infinite"):
        loss_of(model, 0).backward()


def test_a_singular_metric_warns():
    model = model_of()
    precondition_in_backward(model, damping=0.0)
    layer = next(iter(moelora_layers(model).values()))
    layer.moelora_A["default"].weight.data[2] = layer.moelora_A["default"].weight.data[1]
    with pytest.warns(RuntimeWarning, match=r"too ill-conditioned for damping=0 .*raise damping"):
        loss_of(model, 0).backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "gauss_seidel"}, "^order='gauss_seidel' needs the optimizer's own step"),
        ({"gate_max_grad_norm": 1.0}, "set it to None \\(in optim_args: gate_max_grad_norm=null"),
        ({"bias_correction": False}, "^bias_correction=False needs the optimizer's own step"),
        ({"damping": -1.0}, "^damping=-1.0 must not be negative.$"),
    ],
)
def test_what_needs_an_optimizer_of_ours_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(model_of(), "gradamw", in_backward=True, **{**OPTIONS, **options})


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="The model has no trainable LoRA experts"):
        precondition_in_backward(nn.Linear(2, 2))


def test_parameters_of_zero_stage_3_are_refused():
    for in_backward in (False, True):
        model = model_of()
        next(model.parameters()).ds_id = 0
        with pytest.raises(ConfigError, match="use ZeRO stage 1 or 2 with in_backward, or DDP"):
            build_optimizer(model, "rsgd", in_backward=in_backward, **OPTIONS)


class State:
    """What accelerate's state says under an engine; the Trainer sets it up before the optimizer."""

    def __init__(self, **plugins) -> None:
        vars(self).update(plugins)


class Plugin:
    def __init__(self, **settings) -> None:
        vars(self).update(settings)


@pytest.mark.parametrize(
    ("state", "ours", "in_backward"),
    [
        (State(deepspeed_plugin=None), None, None),
        (State(deepspeed_plugin=Plugin(zero_stage=0)), "set in_backward=true", None),
        (State(deepspeed_plugin=Plugin(zero_stage=2)), "set in_backward=true", None),
        (State(deepspeed_plugin=Plugin(zero_stage=3)), "ZeRO stage 1 or 2", "ZeRO stage 1 or 2"),
        (State(fsdp_plugin=Plugin(fsdp_version=2)), None, "remove in_backward"),
        (State(fsdp_plugin=Plugin(fsdp_version=1)), "fsdp_version: 2", "fsdp_version: 2"),
        (State(fsdp_plugin=Plugin()), "fsdp_version: 2", "fsdp_version: 2"),
    ],
)
def test_engines_that_accelerate_will_start_are_refused_in_time(
    state, ours, in_backward, monkeypatch
):
    monkeypatch.setattr("moelora_plugin.optim.engines._accelerate_state", lambda: state)
    for flag, message in ((False, ours), (True, in_backward)):
        if message is None:
            build_optimizer(model_of(), "rsgd", in_backward=flag, **OPTIONS)
            continue
        with pytest.raises(ConfigError, match=message):
            build_optimizer(model_of(), "rsgd", in_backward=flag, **OPTIONS)
