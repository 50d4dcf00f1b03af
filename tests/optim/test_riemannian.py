"""RiemannianSGD and RiemannianAdamW: the step itself."""

from __future__ import annotations

import copy
import itertools
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from moelora_plugin import MoeLoraConfig, RiemannianAdamW, RiemannianSGD, build_optimizer
from moelora_plugin.errors import ConfigError
from moelora_plugin.model import moelora_layers
from moelora_plugin.ops.precondition import precondition
from moelora_plugin.ops.reference import precondition_loop
from moelora_plugin.optim import riemannian
from moelora_plugin.types import LayerPlan

UNEQUAL = f"{__name__}.unequal_ranks"
# Cholesky against an explicit or pseudo-inverse: epsilon times a condition number of a few
# thousand.
CLOSE = {torch.float64: {"rtol": 1e-11, "atol": 1e-11}, torch.float32: {"rtol": 1e-3, "atol": 1e-4}}


def unequal_ranks(config: MoeLoraConfig, module_name: str) -> LayerPlan:
    return LayerPlan(num_experts=3, top_k=2, ranks=(1, 3, 2), alpha=4.0)


def network(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).to(dtype)


def mixture(dtype=torch.float64, **keys):
    defaults = {"r": 2, "num_experts": 3, "top_k": 2, "lora_alpha": 4.0, "lora_dropout": 0.0}
    config = MoeLoraConfig(**{"target_modules": ["0", "2"], **defaults, **keys})
    model = get_peft_model(network(dtype), config)
    torch.manual_seed(1)
    for layer in moelora_layers(model).values():
        for _, b in layer.expert_weights():
            b.normal_()
    return model


def plain_lora(dtype=torch.float64):
    config = LoraConfig(r=3, lora_alpha=4, lora_dropout=0.0, target_modules=["0", "2"])
    return get_peft_model(network(dtype), config)


def loss_of(model, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 6, dtype=dtype, generator=generator)
    target = torch.randn(16, 5, dtype=dtype, generator=generator)
    return scale * (model(x) - target).square().mean()


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def values(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainable(model).items()}


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def by_pair(model):
    """(A, B, ranks, scaling) of every adapted module, in order."""
    for layer in moelora_layers(model).values():
        yield from ((p.a, p.b, p.ranks, p.scaling) for p in layer.expert_pairs())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("allocation", ["uniform", UNEQUAL], ids=["equal", "unequal"])
def test_an_sgd_step_follows_the_slow_loop(allocation, dtype):
    model = mixture(dtype, allocation=allocation)
    optimizer = build_optimizer(
        model, "rsgd", lr=0.1, gate_lr=0.02, gate_max_grad_norm=None, damping=1e-2
    )
    loss_of(model).backward()
    expected = {}
    for layer_name, layer in moelora_layers(model).items():
        ((a, b, ranks, *_),) = [tuple(vars(pair).values()) for pair in layer.expert_pairs()]
        step_a, step_b = precondition_loop(a.detach(), b.detach(), a.grad, b.grad, ranks, 1e-2)
        gate = layer.moelora_gate["default"].weight
        expected[f"{layer_name}.moelora_A.default.weight"] = a.detach() - 0.1 * step_a
        expected[f"{layer_name}.moelora_B.default.weight"] = b.detach() - 0.1 * step_b
        expected[f"{layer_name}.moelora_gate.default.weight"] = gate.detach() - 0.02 * gate.grad
    optimizer.step()
    assert_close(values(model), expected, CLOSE[dtype])


@pytest.mark.parametrize("kind", ["rsgd", "radamw"])
@pytest.mark.parametrize("allocation", ["uniform", UNEQUAL], ids=["equal", "unequal"])
def test_gauss_seidel_takes_b_s_metric_from_the_new_a(kind, allocation):
    """Against a loop that steps a torch optimizer on A, then one on B, by hand."""
    model, by_hand = mixture(allocation=allocation), mixture(allocation=allocation)
    options = {"lr": 0.05, "gate_lr": 0.0, "damping": 1e-2}
    optimizer = build_optimizer(model, kind, order="gauss_seidel", **options)
    jacobi = mixture(allocation=allocation)
    jacobi_optimizer = build_optimizer(jacobi, kind, **options)
    factors_a = [a for a, *_ in by_pair(by_hand)]
    factors_b = [b for _, b, *_ in by_pair(by_hand)]
    if kind == "rsgd":
        of_a, of_b = (torch.optim.SGD(f, lr=0.05) for f in (factors_a, factors_b))
    else:
        adamw = {"lr": 0.05, "eps": 1e-6, "weight_decay": 0.0}
        of_a, of_b = (torch.optim.AdamW(f, **adamw) for f in (factors_a, factors_b))
    for step in range(3):
        for each in (model, by_hand, jacobi):
            each.zero_grad()
            loss_of(each, seed=step).backward()
        optimizer.step()
        jacobi_optimizer.step()
        for a, b, ranks, _ in by_pair(by_hand):
            a.grad, _ = precondition_loop(a.detach(), b.detach(), a.grad, b.grad, ranks, 1e-2)
        of_a.step()
        for a, b, ranks, _ in by_pair(by_hand):
            _, b.grad = precondition_loop(a.detach(), b.detach(), a.grad, b.grad, ranks, 1e-2)
        of_b.step()
    assert_close(values(model), values(by_hand), CLOSE[torch.float64])
    differing = [n for n, v in values(jacobi).items() if not torch.allclose(v, values(model)[n])]
    assert len(differing) == 4  # A and B of both modules


@pytest.mark.parametrize("name", ["rsgd", "radamw"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_on_plain_lora_it_is_peft_s_riemannian_optimizer(name, weight_decay):
    ours, theirs = plain_lora(), plain_lora()
    options = {"lr": 0.01, "weight_decay": weight_decay}
    if name == "radamw":
        options |= {"eps": 1e-6, "betas": (0.9, 0.99)}
    base_class = torch.optim.SGD if name == "rsgd" else torch.optim.AdamW
    optimizer = build_optimizer(ours, name, damping=1e-2, **options)
    from peft.optimizers import create_riemannian_optimizer  # PEFT has it from 0.21 on

    reference = create_riemannian_optimizer(theirs, base_class, reg=1e-2, **options)
    for step in range(5):
        for model, stepper in ((ours, optimizer), (theirs, reference)):
            model.zero_grad()
            loss_of(model, seed=step).backward()
            stepper.step()
    assert_close(values(ours), values(theirs), CLOSE[torch.float64])
    moved = [n for n, v in values(plain_lora()).items() if not torch.equal(v, values(ours)[n])]
    assert len(moved) == 4


def test_on_metrics_that_are_the_identity_it_is_torch_s_adamw():
    torch.manual_seed(0)

    def orthonormal() -> list[torch.Tensor]:
        a = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64))[0].T
        return [
            a.contiguous(),
            torch.linalg.qr(torch.randn(5, 4, dtype=torch.float64))[0].contiguous(),
        ]

    ours = [nn.Parameter(f) for f in orthonormal()]
    theirs = [nn.Parameter(f.detach().clone()) for f in ours]
    options = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
    group = {"params": ours, "role": "experts", "ranks": [[2, 2]], "scalings": [1.0]}
    group["shared"] = ["none"]
    optimizer, reference = (
        RiemannianAdamW([group], damping=0.0, **options),
        torch.optim.AdamW(theirs, **options),
    )
    for _ in range(4):
        for mine, other, start in zip(ours, theirs, orthonormal(), strict=True):
            mine.data.copy_(
                start
            )  # a step leaves the orthonormal factors, so each starts from some
            other.data.copy_(start)
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
        for mine, other in zip(ours, theirs, strict=True):
            # Metrics are the identity up to rounding.
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_without_bias_correction_the_first_step_is_3_16_lr():
    """(1 - 0.9) / sqrt(1 - 0.999) = 3.1623: the reference code's."""
    for bias_correction, expected in ((True, 1.0), (False, 0.1 / 0.001**0.5)):
        model = mixture()
        before = values(model)
        optimizer = build_optimizer(
            model,
            "radamw",
            lr=0.01,
            gate_lr=0.01,
            gate_max_grad_norm=None,
            eps=1e-12,
            bias_correction=bias_correction,
        )
        loss_of(model).backward()
        optimizer.step()
        for name, value in values(model).items():
            moved = (value - before[name]).abs() / 0.01
            torch.testing.assert_close(
                moved, torch.full_like(moved, expected), rtol=1e-6, atol=1e-6
            )


def test_without_bias_correction_it_follows_the_moments_written_out():
    """m and v from zero, never corrected, for several steps."""
    model = mixture()
    optimizer = build_optimizer(
        model, "radamw", lr=0.01, gate_lr=0.02, gate_max_grad_norm=None, bias_correction=False
    )
    gate = next(p for n, p in trainable(model).items() if "moelora_gate" in n)
    m = v = torch.zeros_like(gate)
    expected = gate.detach().clone()
    for step in range(5):
        model.zero_grad()
        loss_of(model, seed=step).backward()
        m, v = 0.9 * m + 0.1 * gate.grad, 0.999 * v + 0.001 * gate.grad**2
        expected = expected - 0.02 * m / (v.sqrt() + 1e-6)
        optimizer.step()
        # Some roundings per step.
        torch.testing.assert_close(gate.detach(), expected, rtol=1e-12, atol=1e-12)
    # The counter goes on from where it started, so that fp32 can count for another eight million.
    assert {float(state["step"]) for state in optimizer.state.values()} == {2**23 + 5}


@pytest.mark.parametrize("order", ["jacobi", "gauss_seidel"])
def test_a_singular_metric_with_no_damping_warns_and_is_never_the_plain_gradient(order):
    """B starts at zero, so A's metric is zero; the gradient of A is zero too, B's is not."""
    model = mixture()
    for a, b, *_ in by_pair(model):
        b.data.zero_()
        a.data[1] = a.data[0]  # two equal rows: the first expert's A A^T is singular
    before = values(model)
    optimizer = build_optimizer(model, "rsgd", lr=1e-3, damping=0.0, order=order)
    loss_of(model).backward()
    grads = {name: p.grad.clone() for name, p in trainable(model).items()}
    with pytest.warns(
        RuntimeWarning, match=r"expert metric\(s\) were too ill-conditioned.*raise damping"
    ):
        optimizer.step()
    for name, value in values(model).items():
        assert torch.isfinite(value).all()
        if "moelora_B" in name:
            plain = -1e-3 * grads[name][:, :2]
            assert not torch.allclose((value - before[name])[:, :2], plain)


@pytest.mark.parametrize("name", ["rsgd", "radamw"])
def test_weights_that_are_nan_stop_the_run(name):
    model = mixture()
    optimizer = build_optimizer(model, name)
    loss_of(model).backward()
    next(by_pair(model))[0].data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="An expert's weights are NaN or infinite"):
        optimizer.step()


@pytest.mark.parametrize("name", ["rsgd", "radamw"])
@pytest.mark.parametrize("order", ["jacobi", "gauss_seidel"])
@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_lora_plus_multiplies_b_s_rate_alone(name, order, ratio):
    """A, whose step comes first, moves as without the ratio; B moves `ratio` times as far."""
    start, plain, model = mixture(), mixture(), mixture()
    for each, factor in ((plain, 1.0), (model, ratio)):
        optimizer = build_optimizer(
            each, name, lr=0.01, damping=1e-2, order=order, lora_plus_ratio=factor
        )
        loss_of(each).backward()
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 0.01
    # The same products in the same order, but for the factor: a few roundings.
    close = {"rtol": 1e-12, "atol": 1e-12}
    for (a, b, *_), (plain_a, plain_b, *_), (_, start_b, *_) in zip(
        by_pair(model), by_pair(plain), by_pair(start), strict=True
    ):
        torch.testing.assert_close(a.detach(), plain_a.detach(), **close)
        moved, expected = (b - start_b).detach(), ratio * (plain_b - start_b).detach()
        torch.testing.assert_close(moved, expected, **close)


@pytest.mark.parametrize("name", ["rsgd", "radamw"])
@pytest.mark.parametrize("order", ["jacobi", "gauss_seidel"])
def test_a_step_leaves_the_gradients_as_they_were(name, order):
    model = mixture()
    optimizer = build_optimizer(model, name, order=order, gate_max_grad_norm=1e-3)
    loss_of(model).backward()
    pointers = {n: p.grad.data_ptr() for n, p in trainable(model).items()}
    before = {n: p.grad.clone() for n, p in trainable(model).items()}
    optimizer.step()
    for n, p in trainable(model).items():
        assert p.grad.data_ptr() == pointers[n]
        assert torch.equal(p.grad, before[n])
    # Without zero_grad gradients add up, as with any optimizer of torch's.
    loss_of(model).backward()
    optimizer.step()
    for n, p in trainable(model).items():
        assert p.grad.data_ptr() == pointers[n]
        assert not torch.equal(p.grad, before[n])


@pytest.mark.parametrize("order", ["jacobi", "gauss_seidel"])
def test_gradients_survive_a_step_that_fails(order):
    model = mixture()
    optimizer = build_optimizer(model, "rsgd", order=order)
    loss_of(model).backward()
    before = {n: p.grad.clone() for n, p in trainable(model).items()}
    # The second module's A breaks its B's metric, after other gradients have been replaced already.
    list(by_pair(model))[1][0].data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert all(torch.equal(p.grad, before[n]) for n, p in trainable(model).items())
    assert optimizer.param_groups[0]["lr"] == 1e-5


@pytest.mark.parametrize("name", ["rsgd", "radamw"])
def test_a_metric_that_fails_moves_nothing(name):
    model = mixture()
    optimizer = build_optimizer(model, name, lr=0.1, gate_lr=0.1)
    loss_of(model).backward()
    list(by_pair(model))[1][0].data[0, 0] = float("nan")
    before = values(model)
    with pytest.raises(FloatingPointError):
        optimizer.step()
    for n, v in values(model).items():
        torch.testing.assert_close(v, before[n], rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("name", ["rsgd", "radamw"])
@pytest.mark.parametrize("order", ["jacobi", "gauss_seidel"])
def test_portions_of_any_size_give_the_same_step(name, order, monkeypatch):
    """And only one portion's preconditioned gradients exist at a time."""
    results = []
    for size, most in ((1, 1), (2**30, 2)):  # two modules: one factor, or all of a side
        monkeypatch.setattr(riemannian, "_PORTION_BYTES", {"cpu": size})
        made, alive = [], []

        def counted(*args, made=made, alive=alive):
            made.append(weakref.ref(result := precondition(*args)))
            alive.append(sum(ref() is not None for ref in made))
            return result

        monkeypatch.setattr(riemannian, "precondition", counted)
        model = mixture()
        optimizer = build_optimizer(model, name, lr=0.01, order=order, lora_plus_ratio=2.0)
        for step in range(2):
            model.zero_grad()
            loss_of(model, seed=step).backward()
            optimizer.step()
        assert max(alive) == most
        results.append(values(model))
    assert all(torch.equal(v, results[1][n]) for n, v in results[0].items())


@pytest.mark.parametrize("name", ["rsgd", "radamw"])
@pytest.mark.parametrize("order", ["jacobi", "gauss_seidel"])
def test_step_hooks_run_once_for_a_step(name, order):
    """torch puts hooks around a class's step when an object of the class is made, ours or not."""
    spare = [nn.Parameter(torch.zeros(1))]
    torch.optim.SGD(spare, lr=0.1)
    torch.optim.AdamW(spare, lr=0.1)
    model = mixture()
    optimizer = build_optimizer(model, name, order=order)
    seen = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(("before", len(optimizer.param_groups)))
    )
    optimizer.register_step_post_hook(
        lambda *_: seen.append(("after", len(optimizer.param_groups)))
    )
    loss_of(model).backward()
    optimizer.step()
    assert seen == [("before", 2), ("after", 2)]


def test_adamw_is_fused_unless_told_otherwise():
    model = mixture()
    assert all(group["fused"] for group in build_optimizer(model, "radamw").param_groups)
    for options in ({"foreach": True}, {"foreach": False}, {"fused": False}):
        groups = build_optimizer(model, "radamw", **options).param_groups
        assert not any(group["fused"] for group in groups)
    fresh = build_optimizer(model, "radamw").param_groups
    elsewhere = [p.detach().to("meta").requires_grad_() for p in fresh[1]["params"]]
    groups = [fresh[0], {"params": elsewhere, "role": "gates"}]
    with_meta = RiemannianAdamW([{k: v for k, v in g.items() if k != "fused"} for g in groups])
    assert [group["fused"] for group in with_meta.param_groups] == [True, None]


@pytest.mark.parametrize("name", ["rsgd", "radamw"])
def test_an_expert_pair_without_gradients_stays_where_it_is(name):
    model = mixture()
    optimizer = build_optimizer(model, name, lr=0.1)
    loss_of(model).backward()
    (a, b, *_), _ = by_pair(model)
    a.grad = b.grad = None
    before = values(model)
    optimizer.step()
    unmoved = {n for n, v in values(model).items() if torch.equal(v, before[n])}
    assert {n.partition("moelora_")[2] for n in unmoved} == {"A.default.weight", "B.default.weight"}
    optimizer.zero_grad()
    before = values(model)
    optimizer.step()  # no gradients at all
    assert all(torch.equal(v, before[n]) for n, v in values(model).items())


@pytest.mark.parametrize("name", ["rsgd", "radamw"])
@pytest.mark.parametrize("order", ["jacobi", "gauss_seidel"])
@pytest.mark.parametrize("path", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_torch_s_faster_paths_give_the_same_step(name, order, path):
    results = []
    for options in ({}, path):
        model = mixture(torch.float32)
        optimizer = build_optimizer(
            model,
            name,
            lr=0.01,
            gate_lr=0.01,
            order=order,
            bias_correction=False,
            damping=1e-2,
            **options,
        )
        for step in range(3):
            model.zero_grad()
            loss_of(model, seed=step).backward()
            optimizer.step()
        results.append(values(model))
    # The kernels round in another order; three fp32 steps.
    assert_close(*results, {"rtol": 1e-4, "atol": 1e-5})


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["rsgd", "radamw"])
def test_a_grad_scaler_changes_nothing_but_skips_infinite_gradients(name, fused):
    """Powers of two scale and unscale without rounding, so the steps agree to the bit."""
    plain, scaled = mixture(torch.float32), mixture(torch.float32)
    options = {"lr": 0.01, "gate_lr": 0.01, "gate_max_grad_norm": 0.01, "fused": fused}
    optimizer = build_optimizer(plain, name, **options)
    behind_scaler = build_optimizer(scaled, name, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        plain.zero_grad()
        loss_of(plain, seed=step).backward()
        optimizer.step()
        scaled.zero_grad()
        scaler.scale(loss_of(scaled, seed=step)).backward()
        scaler.step(behind_scaler)
        scaler.update()
    assert all(torch.equal(v, values(plain)[n]) for n, v in values(scaled).items())
    before = values(scaled)
    scaled.zero_grad()
    scaler.scale(loss_of(scaled, scale=float("inf"))).backward()
    scaler.step(behind_scaler)
    assert all(torch.equal(v, before[n]) for n, v in values(scaled).items())


@pytest.mark.parametrize("order", ["jacobi", "gauss_seidel"])
@pytest.mark.parametrize("name", ["rsgd", "radamw"])
def test_a_closure_is_evaluated_once_and_its_loss_returned(name, order):
    with_closure, without = mixture(), mixture()
    optimizer = build_optimizer(with_closure, name, lr=0.01, order=order)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(with_closure)
        loss.backward()
        calls.append(loss.detach())
        return loss

    returned = optimizer.step(closure)
    assert len(calls) == 1
    assert torch.equal(returned.detach(), calls[0])
    plain = build_optimizer(without, name, lr=0.01, order=order)
    loss_of(without).backward()
    assert plain.step() is None
    assert all(torch.equal(v, values(without)[n]) for n, v in values(with_closure).items())


@pytest.mark.parametrize("order", ["jacobi", "gauss_seidel"])
def test_a_scheduler_scales_the_rate_of_every_group(order):
    model, fixed = mixture(), mixture()
    options = {"order": order, "lora_plus_ratio": 2.0}
    optimizer = build_optimizer(model, "rsgd", lr=0.2, gate_lr=0.04, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    loss_of(model).backward()
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.02]
    assert scheduler.get_last_lr() == [0.1, 0.02]
    fixed.load_state_dict(model.state_dict())
    half = build_optimizer(fixed, "rsgd", lr=0.1, gate_lr=0.02, **options)
    for each, stepper in ((model, optimizer), (fixed, half)):
        each.zero_grad()
        loss_of(each).backward()
        stepper.step()
    assert all(torch.equal(v, values(fixed)[n]) for n, v in values(model).items())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_takes_torch_s_own_options(momentum):
    model, fresh = mixture(), mixture()
    optimizer = build_optimizer(model, "rsgd", lr=0.1, gate_lr=0.1, momentum=momentum)
    assert isinstance(optimizer, torch.optim.SGD)
    for _ in range(2):
        model.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    buffers = [s.get("momentum_buffer") for s in optimizer.state.values()]
    assert all((buffer is not None) == bool(momentum) for buffer in buffers)
    assert any(not torch.equal(v, values(fresh)[n]) for n, v in values(model).items())


def test_options_out_of_range_are_refused():
    for name, (options, message) in itertools.product(
        ["rsgd", "gradamw"],
        [
            ({"order": "both"}, "order='both' must be one of jacobi, gauss_seidel."),
            ({"damping": -1e-6}, "damping=-1e-06 must not be negative."),
        ],
    ):
        with pytest.raises(ConfigError) as caught:
            build_optimizer(mixture(), name, **options)
        assert str(caught.value) == message


def test_a_group_that_lost_a_parameter_is_refused():
    model = mixture()
    groups = build_optimizer(model, "rsgd").param_groups
    broken = {**groups[0], "params": groups[0]["params"][:-1]}
    with pytest.raises(ConfigError, match="An experts group holds 3 parameters for 2 pairs"):
        RiemannianSGD([broken])


def test_a_copy_of_the_optimizer_steps_like_the_original():
    model = mixture()
    optimizer = build_optimizer(model, "gradamw", order="gauss_seidel", bias_correction=False)
    both = [(model, optimizer), copy.deepcopy((model, optimizer))]
    for each, stepper in both:
        for step in range(2):
            each.zero_grad()
            loss_of(each, seed=step).backward()
            stepper.step()
    assert all(torch.equal(v, values(both[1][0])[n]) for n, v in values(model).items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["moelora_A", "moelora_B", "moelora_gate"])
@pytest.mark.parametrize("name", ["rsgd", "gradamw"])
def test_a_gradient_that_is_not_finite_stops_the_step_and_is_named(name, part, value):
    """One entry in one layer: nothing moves, where all gates or an expert became NaN."""
    model = mixture()
    optimizer = build_optimizer(model, name, lr=0.1, gate_lr=0.1)
    loss_of(model).backward()
    broken = [n for n in trainable(model) if part in n][1]
    trainable(model)[broken].grad.view(-1)[3] = value
    before = values(model)
    with pytest.raises(FloatingPointError) as caught:
        optimizer.step()
    assert f"The gradient of {broken} is NaN or infinite" in str(caught.value)
    assert all(torch.equal(v, before[n]) for n, v in values(model).items())
    for parameter in trainable(model).values():
        parameter.grad.nan_to_num_(posinf=0.0)
    optimizer.step()
    assert all(v.isfinite().all() for v in values(model).values())


def test_of_several_broken_gradients_the_one_nearest_to_the_loss_is_named():
    model = mixture()
    optimizer = build_optimizer(model, "radamw")
    loss_of(model).backward()
    experts = [n for n in trainable(model) if "moelora_A" in n or "moelora_B" in n]
    for n in experts:
        trainable(model)[n].grad.fill_(float("nan"))
    more = len(experts) - 1
    with pytest.raises(FloatingPointError, match=rf"{experts[-1]} \(and {more} more\)"):
        optimizer.step()


def test_a_norm_that_overflows_is_no_broken_gradient():
    model = mixture().float()
    optimizer = build_optimizer(model, "rsgd", lr=1e-3, gate_lr=1e-3)
    loss_of(model).backward()
    for parameter in trainable(model).values():
        parameter.grad.fill_(1e20)  # whose square is infinite
    optimizer.step()
    assert all(v.isfinite().all() for v in values(model).values())


def test_a_loss_scaler_skips_the_step_itself():
    model = mixture().float()
    optimizer = build_optimizer(model, "gradamw", lr=0.1, gate_lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_of(model)).backward()
    next(iter(trainable(model).values())).grad[0, 0] = float("inf")
    before = values(model)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(v, before[n]) for n, v in values(model).items())


def test_names_are_no_part_of_what_is_saved():
    optimizer = build_optimizer(mixture(), "radamw")
    assert all("names" not in group for group in optimizer.state_dict()["param_groups"])
    copied = copy.deepcopy(optimizer)
    assert copied._names == optimizer._names
