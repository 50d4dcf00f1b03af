"""The optimizers on every expert kind: what is preconditioned by what, and what trains as it is.

The file is a script as well: `test_two_processes_under_fsdp2_train_as_one` runs it in two
processes.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters
from peft import get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard

from moelora_plugin import MoeLoraConfig, build_optimizer
from moelora_plugin.errors import ConfigError
from moelora_plugin.experts import EXPERTS
from moelora_plugin.model import moelora_layers
from moelora_plugin.ops.reference import precondition_loop, precondition_shared_loop
from moelora_plugin.optim import OPTIMIZERS, RiemannianSGD, precondition_in_backward

D, EXPERTS_OF_A_LAYER, RANK, DAMPING, LR = 12, 3, 2, 1e-2, 0.1
# The metrics' inverses by Cholesky and by LU, amplified by their condition, at most some thousands.
CLOSE = {"rtol": 1e-9, "atol": 1e-10}

VARIANTS = {"rank, joint": ("rank", {"metric": "joint"})}
KINDS = {**{name: (name, {}) for name in EXPERTS}, **VARIANTS}
RANK_ONE = {"rank", "pools", "frozen_sparse_a"}
# Kinds whose factors have no metric; everything in them is an ordinary parameter.
UNDEFINED = {"vector", "tree", "mixed_factors", "pools", "tensor"}


def adapted(case: str, **keys) -> nn.Module:
    name, options = KINDS[case]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)).double()
    defaults = {
        "r": 1 if name in RANK_ONE else RANK, "num_experts": EXPERTS_OF_A_LAYER, "top_k": 2,
        "lora_alpha": 2, "lora_dropout": 0.0, "target_modules": ["0", "2"],
        "expert": name, "expert_kwargs": options,
    }  # fmt: skip
    config = MoeLoraConfig(**{**defaults, **keys})
    model = get_peft_model(net, config, autocast_adapter_dtype=False)
    for layer in moelora_layers(model).values():
        for tensor_name, tensor in layer.tensors().items():
            if tensor_name not in layer.moelora_mixture["default"].experts.frozen:
                tensor.data.normal_(std=0.5)
    return model


def loss_of(model: nn.Module, step: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, D, dtype=torch.float64, generator=generator)
    rank, world = (dist.get_rank(), 2) if dist.is_initialized() else (0, 1)
    return model(x.chunk(world)[rank]).square().mean()


def expert_tensors(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    return [layer.tensors() for layer in moelora_layers(model).values()]


def by_the_oracle(case, a, b, grad_a, grad_b):
    """What the slow loops make of the gradients of one layer's pair."""
    name = KINDS[case][0]
    if name in ("shared_a", "shared_b"):
        return precondition_shared_loop(a, b, grad_a, grad_b, EXPERTS_OF_A_LAYER, name[-1], DAMPING)
    if case == "rank, joint":
        ranks = (EXPERTS_OF_A_LAYER,)
    else:
        ranks = (1 if name in RANK_ONE else RANK,) * EXPERTS_OF_A_LAYER
    return precondition_loop(a, b, grad_a, grad_b, ranks, DAMPING)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("compensation", [False, True])
@pytest.mark.parametrize("case", KINDS)
def test_one_step_is_the_oracle_s(case, compensation, in_backward):
    """A and B by their metrics, everything else by its plain gradient."""
    model = adapted(case)
    loss_of(model).backward()
    before = [{n: t.detach().clone() for n, t in each.items()} for each in expert_tensors(model)]
    grads = [{n: t.grad for n, t in each.items()} for each in expert_tensors(model)]
    optimizer = build_optimizer(
        model, "rsgd", lr=LR, gate_lr=LR, damping=DAMPING, scale_compensation=compensation,
        gate_max_grad_norm=None, in_backward=in_backward,
    )  # fmt: skip
    if in_backward:
        optimizer.zero_grad()
        model.zero_grad()
        grads = [{n: None if g is None else g.clone() for n, g in each.items()} for each in grads]
        loss_of(model).backward()
    assert all(group["params"] for group in optimizer.param_groups)
    optimizer.step()
    scaling = next(iter(moelora_layers(model).values())).moelora_mixture["default"].scaling
    divisor = scaling**2 if compensation else 1.0
    for old, grad, new in zip(before, grads, expert_tensors(model), strict=True):
        expected = dict(grad)
        if KINDS[case][0] not in UNDEFINED:
            frozen = grad["A"] is None
            grad_a = torch.zeros_like(old["A"]) if frozen else grad["A"]
            found_a, found_b = by_the_oracle(case, old["A"], old["B"], grad_a, grad["B"])
            expected["A"] = None if frozen else found_a / divisor
            expected["B"] = found_b / divisor
        for name, tensor in new.items():
            moved = old[name] if expected[name] is None else old[name] - LR * expected[name]
            torch.testing.assert_close(tensor.detach(), moved, **CLOSE)


def test_the_metrics_by_hand():
    """Two experts that share a = (3, 4), with b's of squares 1 and 4: a has 5, each b has 25."""
    a = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    grad_a, grad_b = 10 * torch.ones_like(a), 50 * torch.ones_like(b)
    found_a, found_b = precondition_shared_loop(a, b, grad_a, grad_b, 2, "a", 0.0)
    assert found_a.tolist() == [[2.0, 2.0]]
    assert found_b.tolist() == [[2.0, 2.0]]
    found_b, found_a = precondition_shared_loop(b.T, a.T, grad_b.T, grad_a.T, 2, "b", 0.0)
    assert (found_a.T.tolist(), found_b.T.tolist()) == ([[2.0, 2.0]], [[2.0, 2.0]])


def test_what_has_no_metric_is_in_an_ordinary_group():
    for case in KINDS:
        model = adapted(case)
        optimizer = build_optimizer(model, "radamw", gate_lr=1e-3)
        of_experts = [g for g in optimizer.param_groups if g["role"] == "experts"]
        assert bool(of_experts) == (KINDS[case][0] not in UNDEFINED), case
        grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
        trainable = [id(p) for p in model.parameters() if p.requires_grad]
        assert sorted(grouped) == sorted(trainable), case


@pytest.mark.parametrize("order", ["jacobi", "gauss_seidel"])
@pytest.mark.parametrize("case", ["shared_a", "shared_b", "frozen_sparse_a", "rank, joint", "dora"])
def test_a_stepped_before_b_takes_the_metric_of_the_new_a(case, order):
    model = adapted(case)
    loss_of(model).backward()
    before = [{n: t.detach().clone() for n, t in each.items()} for each in expert_tensors(model)]
    grads = [{n: t.grad for n, t in each.items()} for each in expert_tensors(model)]
    build_optimizer(
        model, "rsgd", lr=LR, gate_lr=LR, damping=DAMPING, order=order, lora_plus_ratio=2.0
    ).step()
    for old, grad, new in zip(before, grads, expert_tensors(model), strict=True):
        a = new["A"].detach() if order == "gauss_seidel" else old["A"]
        grad_a = torch.zeros_like(a) if grad["A"] is None else grad["A"]
        _, expected_b = by_the_oracle(case, a, old["B"], grad_a, grad["B"])
        torch.testing.assert_close(new["B"].detach(), old["B"] - 2 * LR * expected_b, **CLOSE)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_and_momentum_leave_a_frozen_factor_alone(name):
    model = adapted("frozen_sparse_a")
    momentum = {} if "adamw" in name else {"momentum": 0.9}
    optimizer = build_optimizer(
        model, name, lr=LR, gate_lr=LR, weight_decay=0.5, damping=DAMPING, **momentum
    )
    before = copy.deepcopy(expert_tensors(model))
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    for old, new in zip(before, expert_tensors(model), strict=True):
        assert torch.equal(old["A"], new["A"])
        assert not torch.allclose(old["B"], new["B"])
    assert not any(layer["A"].grad is not None for layer in expert_tensors(model))


@pytest.mark.parametrize("case", KINDS)
def test_a_run_goes_on_from_a_file_as_if_it_had_not_stopped(case, tmp_path):
    def steps(model, optimizer, which):
        for step in which:
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()

    options = {"lr": 0.01, "gate_lr": 0.01, "damping": DAMPING}
    model = adapted(case)
    optimizer = build_optimizer(model, "gradamw", **options)
    steps(model, optimizer, range(2))
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state")
    weights, state = torch.load(tmp_path / "state", weights_only=True)
    again = adapted(case)
    resumed = build_optimizer(again, "gradamw", **options)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    for each, other in ((model, optimizer), (again, resumed)):
        steps(each, other, range(2, 4))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_frozen_factor_is_read_where_it_is_now():
    """Moving a model to another dtype or device replaces its buffers, not its parameters."""
    model = adapted("frozen_sparse_a").float()
    optimizer = build_optimizer(model, "rsgd", lr=LR, gate_lr=LR, damping=DAMPING)
    handled = adapted("frozen_sparse_a").float()
    build_optimizer(
        handled, "rsgd", lr=LR, gate_lr=LR, damping=DAMPING, in_backward=True,
        gate_max_grad_norm=None,
    )  # fmt: skip
    for each in (model, handled):
        each.double()
        for layer in expert_tensors(each):
            layer["A"].mul_(3)
    before = copy.deepcopy(expert_tensors(model))
    loss_of(model).backward()
    grads = [layer["B"].grad.clone() for layer in expert_tensors(model)]
    optimizer.step()
    loss_of(handled).backward()
    for old, grad, new, other in zip(
        before, grads, expert_tensors(model), expert_tensors(handled), strict=True
    ):
        _, expected = by_the_oracle(
            "frozen_sparse_a", old["A"], old["B"], torch.zeros_like(old["A"]), grad
        )
        torch.testing.assert_close(new["B"].detach(), old["B"] - LR * expected, **CLOSE)
        torch.testing.assert_close(other["B"].grad, expected, **CLOSE)


def test_engines_that_swap_parameters_find_all_of_them():
    """accelerate maps the addresses of named parameters; what it does not know is a KeyError."""
    for case in ("frozen_sparse_a", "shared_a", "dora"):
        model = adapted(case)
        optimizer = build_optimizer(model, "radamw", gate_lr=1e-3)
        mapping = {p.data_ptr(): p for p in model.parameters()}
        for group in optimizer.param_groups:
            for i, parameter in enumerate(group["params"]):
                address, stand_in = parameter.data_ptr(), torch.empty(1)
                stand_in.data_ptr = address
                group["params"][i] = stand_in
        fsdp2_switch_optimizer_parameters(optimizer, mapping)
        loss_of(model).backward()
        optimizer.step()


def test_a_copy_of_an_optimizer_keeps_its_frozen_factors():
    model = adapted("frozen_sparse_a")
    optimizer = build_optimizer(model, "rsgd", lr=LR, gate_lr=LR)
    copied_model, copied = copy.deepcopy((model, optimizer))
    for each, other in ((model, optimizer), (copied_model, copied)):
        loss_of(each).backward()
        other.step()
    for mine, theirs in zip(expert_tensors(model), expert_tensors(copied_model), strict=True):
        assert torch.equal(mine["B"], theirs["B"])


def test_groups_serve_one_optimizer():
    optimizer = build_optimizer(adapted("frozen_sparse_a"), "rsgd")
    with pytest.raises(ConfigError, match="lacks its frozen factors"):
        RiemannianSGD(optimizer.param_groups)


@pytest.mark.parametrize("in_backward", [False, True])
def test_where_only_routers_train_the_default_gate_lr_is_warned_of(in_backward):
    model = adapted("lora", expert_kwargs={"frozen": True})
    options = {"in_backward": in_backward, "gate_max_grad_norm": None}
    with pytest.warns(UserWarning, match=r"Only routers train, and gate_lr=3e-08.*set gate_lr"):
        build_optimizer(model, "radamw", **options)
    for layer in expert_tensors(model):  # an adapter's weights
        layer["A"].normal_()
        layer["B"].normal_()
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, "radamw", gate_lr=0.1, weight_decay=0.3, **options)
    assert [group.get("role", "gates") for group in optimizer.param_groups] == ["gates"]
    loss_of(model).backward()
    optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("moelora_gate" not in name), name


def test_no_warning_where_experts_train():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_optimizer(adapted("lora"), "radamw")


@pytest.mark.parametrize("case", ["shared_a", "frozen_sparse_a"])
def test_a_loss_scaler_changes_nothing(case):
    def one_step(scale):
        model = adapted(case).float()
        optimizer = build_optimizer(model, "rsgd", lr=LR, gate_lr=LR, damping=DAMPING)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scale)
        x = torch.randn(8, D, generator=torch.Generator().manual_seed(0))
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        return model.state_dict()

    plain, scaled = one_step(False), one_step(True)
    for name, tensor in plain.items():
        assert torch.equal(tensor, scaled[name]), name  # a power of two is exact


def test_hooks_and_steps_find_nothing_to_precondition_where_only_routers_train():
    model = adapted("lora", expert_kwargs={"frozen": True})
    for layer in expert_tensors(model):
        layer["B"].normal_()
        layer["A"].normal_()
    handle = precondition_in_backward(model)
    loss_of(model).backward()
    handle.remove()


# Under FSDP2

FSDP2_CASES = ["lora", "shared_a", "shared_b", "rank, joint", "frozen_sparse_a", "dora", "tree"]


def train(case: str) -> dict[str, torch.Tensor]:
    model = adapted(case)
    if dist.is_initialized():
        for layer in moelora_layers(model).values():
            fully_shard(layer)
        fully_shard(model)
    optimizer = build_optimizer(model, "gradamw", lr=0.02, gate_lr=0.05, damping=DAMPING)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    named = model.named_parameters()
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in named}
    return {n: p.detach().clone() for n, p in whole.items()}


@pytest.mark.slow
def test_two_processes_under_fsdp2_train_as_one(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(tmp_path), str(rank)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    found = torch.load(tmp_path / "weights", weights_only=True)
    for case in FSDP2_CASES:
        for name, expected in train(case).items():
            torch.testing.assert_close(
                found[case][name], expected, **CLOSE, msg=lambda m, n=name, c=case: f"{c} {n}: {m}"
            )


if __name__ == "__main__":
    folder, process_rank = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=process_rank, world_size=2
    )
    results = {case: train(case) for case in FSDP2_CASES}
    if process_rank == 0:
        torch.save(results, folder / "weights")
    dist.barrier()
    dist.destroy_process_group()
