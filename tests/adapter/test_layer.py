"""One adapted linear: its value, its gradients and the ways torch may run it.

Every layer here is made by `get_peft_model`, as users' are.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from torch import nn

from moelora_plugin import MoeLoraConfig
from moelora_plugin.model import moelora_layers
from moelora_plugin.ops.reference import moe_lora_loop, topk_softmax_loop
from moelora_plugin.types import LayerPlan, Place

D_IN, D_OUT = 12, 10
MODES = ["none", "sqrt", "exact"]


def unequal_ranks(config: MoeLoraConfig, place: Place) -> LayerPlan:
    """A user's own allocation: more rank for the second projection, none alike within a module."""
    ranks = (1, 3, 2) if place.name.endswith("0") else (2, 5, 1)
    return LayerPlan(num_experts=3, top_k=2, ranks=ranks, alpha=config.lora_alpha)


def config_for(**keys) -> MoeLoraConfig:
    defaults = {"r": 2, "num_experts": 4, "top_k": 2, "lora_alpha": 6, "lora_dropout": 0.0}
    return MoeLoraConfig(**{"target_modules": ["0"], **defaults, **keys})


def adapted(dtype=torch.float32, autocast_adapter_dtype=True, linears=1, **keys) -> nn.Sequential:
    """Linears with random weights; every expert and gate random too."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(*s) for s in [(D_IN, D_OUT), (D_OUT, D_IN)][:linears])).to(
        dtype
    )
    get_peft_model(net, config_for(**keys), autocast_adapter_dtype=autocast_adapter_dtype)
    for layer in moelora_layers(net).values():
        for a, b in layer.expert_weights():
            a.normal_(std=0.5)
            b.normal_(std=0.5)
        layer.router_weights().normal_()
    return net


def run(
    net: nn.Module, x: torch.Tensor, autocast: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output and every gradient, x's included."""
    x = x.detach().requires_grad_()
    net.zero_grad()
    torch.manual_seed(3)  # for dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = net(x)
    y.to(torch.promote_types(y.dtype, torch.float32)).square().sum().backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.requires_grad}
    return y.detach(), {**grads, "x": x.grad}


def assert_all_equal(found, expected):
    (y, grads), (expected_y, expected_grads) = found, expected
    assert torch.equal(y, expected_y)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert torch.equal(grad, expected_grads[name]), name


@pytest.mark.parametrize("shape", [(7,), (2, 5)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_one_expert_is_peft_s_lora_to_the_bit(dtype, use_rslora, shape):
    """Value and every gradient, in every mode: with gate 1 all exponents are the same."""
    for (d_in, d_out, rank), mode in itertools.product(
        [(12, 10, 4), (33, 65, 5), (128, 64, 16)], MODES
    ):
        torch.manual_seed(0)
        ours = nn.Sequential(nn.Linear(d_in, d_out)).to(dtype)
        theirs = copy.deepcopy(ours)
        common = {"r": rank, "lora_alpha": 10, "lora_dropout": 0.0, "target_modules": ["0"]}
        one = MoeLoraConfig(
            num_experts=1, top_k=1, use_rslora=use_rslora, gate_rescale=mode, **common
        )
        get_peft_model(ours, one, autocast_adapter_dtype=False)
        lora = LoraConfig(use_rslora=use_rslora, **common)
        get_peft_model(theirs, lora, autocast_adapter_dtype=False)
        lora_a, lora_b = theirs[0].lora_A["default"].weight, theirs[0].lora_B["default"].weight
        lora_b.data.normal_()
        ((a, b),) = ours[0].expert_weights()
        a.copy_(lora_a.detach())
        b.copy_(lora_b.detach())

        x = torch.randn(*shape, d_in, dtype=dtype)
        y, grads = run(ours, x)
        lora_y, lora_grads = run(theirs, x)
        assert torch.equal(y, lora_y)
        assert torch.equal(grads["x"], lora_grads["x"])
        assert torch.equal(
            grads["0.moelora_A.default.weight"], lora_grads["0.lora_A.default.weight"]
        )
        assert torch.equal(
            grads["0.moelora_B.default.weight"], lora_grads["0.lora_B.default.weight"]
        )
        assert not grads["0.moelora_gate.default.weight"].any()  # the gate is 1 whatever x is


@pytest.mark.parametrize("mode", MODES)
def test_the_layer_is_the_base_plus_the_oracle_s_mixture(mode):
    net = adapted(torch.float64, gate_rescale=mode)
    layer, x = net[0], torch.randn(9, D_IN, dtype=torch.float64)
    y, grads = run(net, x)

    leaves = [p.detach().clone().requires_grad_() for p in layer.parameters() if p.requires_grad]
    router, a, b = leaves
    x = x.requires_grad_()
    weights = topk_softmax_loop(x @ router.T, 2)
    update = moe_lora_loop(x, a, b, weights, (2,) * 4, 3.0, mode)  # s = alpha / r = 6 / 2
    expected = layer.base_layer(x) + update
    expected.square().sum().backward()
    # Another order of summation: some tens of roundings of numbers up to a hundred.
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(y, expected.detach(), **close)
    names = [
        "0.moelora_gate.default.weight",
        "0.moelora_A.default.weight",
        "0.moelora_B.default.weight",
        "x",
    ]
    for name, leaf in zip(names, [*leaves, x], strict=True):
        torch.testing.assert_close(grads[name], leaf.grad, **close)


@pytest.mark.parametrize("mode", MODES)
def test_experts_in_another_order_are_the_same_mixture(mode):
    net, x = adapted(torch.float64, gate_rescale=mode), torch.randn(9, D_IN, dtype=torch.float64)
    y, grads = run(net, x)
    permuted = copy.deepcopy(net)
    order = [2, 0, 3, 1]
    gates, experts = net[0].router_weights(), net[0].expert_weights()
    permuted[0].router_weights().copy_(gates[order])
    for (a, b), i in zip(permuted[0].expert_weights(), order, strict=True):
        a.copy_(experts[i][0])
        b.copy_(experts[i][1])
    permuted_y, permuted_grads = run(permuted, x)
    # The experts are summed in another order.
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(permuted_y, y, **close)
    torch.testing.assert_close(permuted_grads["x"], grads["x"], **close)
    a_grads = grads["0.moelora_A.default.weight"].unflatten(0, (4, 2))[order].flatten(0, 1)
    torch.testing.assert_close(permuted_grads["0.moelora_A.default.weight"], a_grads, **close)
    gate = "0.moelora_gate.default.weight"
    torch.testing.assert_close(permuted_grads[gate], grads[gate][order], **close)


def test_tokens_do_not_see_each_other():
    net, x = adapted(torch.float64), torch.randn(9, D_IN, dtype=torch.float64)
    order = torch.randperm(9)
    y, grads = run(net, x)
    permuted_y, permuted_grads = run(net, x[order])
    # The same products, but the matrix kernels may group rows otherwise.
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(permuted_y, y[order], **close)
    torch.testing.assert_close(permuted_grads["x"], grads["x"][order], **close)


def test_a_token_with_nan_leaves_the_others_as_they_were():
    net, x = adapted(), torch.randn(2, 5, D_IN)
    clean = net(x)
    x[0, 3, 1] = float("nan")
    y = net(x)
    assert y[0, 3].isnan().all()
    others = torch.ones(2, 5, dtype=torch.bool)
    others[0, 3] = False
    assert torch.equal(y[others], clean[others])


def test_2d_and_3d_inputs_agree():
    net, x = adapted(), torch.randn(2, 5, D_IN)
    y, grads = run(net, x)
    assert y.shape == (2, 5, D_OUT)
    flat_y, flat_grads = run(net, x.flatten(0, 1))
    flat_grads["x"] = flat_grads["x"].view(2, 5, D_IN)
    assert_all_equal((flat_y.view(2, 5, D_OUT), flat_grads), (y, grads))
    assert net(torch.randn(3, 2, 5, D_IN)).shape == (3, 2, 5, D_OUT)
    assert net(torch.randn(D_IN)).shape == (D_OUT,)
    assert net(torch.randn(0, D_IN)).shape == (0, D_OUT)


def test_unequal_ranks_come_from_an_allocation_of_ones_own():
    net = adapted(
        torch.float64, linears=2, target_modules=["0", "1"], allocation=f"{__name__}.unequal_ranks"
    )
    assert net[0].moelora_A["default"].weight.shape == (6, D_IN)
    assert net[1].moelora_B["default"].weight.shape == (D_IN, 8)
    assert [a.shape[0] for a, _ in net[1].expert_weights()] == [2, 5, 1]
    layer, x = net[1], torch.randn(9, D_OUT, dtype=torch.float64)
    weights = topk_softmax_loop(x @ layer.router_weights().T, 2)
    a, b = layer.moelora_A["default"].weight, layer.moelora_B["default"].weight
    scaling = 6 / (8 / 3)  # alpha over the mean rank
    expected = layer.base_layer(x) + moe_lora_loop(x, a, b, weights, (2, 5, 1), scaling)
    # Another order of summation.
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wide", [True, False])
def test_parameter_dtypes(dtype, wide):
    net = adapted(dtype, autocast_adapter_dtype=wide)
    layer, x = net[0], torch.randn(2, 5, D_IN, dtype=dtype)
    own = torch.float32 if wide else dtype
    assert {p.dtype for p in layer.parameters() if p.requires_grad} == {own}
    y, grads = run(net, x)
    assert y.dtype == dtype
    assert all(grad.dtype == (dtype if name == "x" else own) for name, grad in grads.items())
    weights = topk_softmax_loop(x.flatten(0, 1).to(own) @ layer.router_weights().T, 2)
    flat = x.flatten(0, 1).float()
    a, b = layer.moelora_A["default"].weight.float(), layer.moelora_B["default"].weight.float()
    expected = layer.base_layer.float()(flat) + moe_lora_loop(
        flat, a, b, weights.float(), (2,) * 4, 3.0
    )
    # z, h, the update, the base's result and their sum are each rounded once: a handful of
    # epsilons.
    error = (y.flatten(0, 1).float() - expected).abs().max()
    assert error < 8 * torch.finfo(dtype).eps * expected.abs().max()


def test_autocast_computes_in_bf16_and_keeps_gradients_wide():
    net, x = adapted(), torch.randn(2, 5, D_IN)
    expected, expected_grads = run(net, x)
    y, grads = run(net, x, autocast=True)
    assert y.dtype == torch.bfloat16
    # Roundings to bf16 as above; the gates may choose another expert only where two are as good.
    eps = torch.finfo(torch.bfloat16).eps
    assert (y.float() - expected).abs().max() < 8 * eps * expected.abs().max()
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        scale = expected_grads[name].abs().max()
        assert (grad - expected_grads[name]).abs().max() < 16 * eps * scale, name


def test_dropout_acts_on_the_experts_in_training_only():
    net, x = adapted(lora_dropout=0.5), torch.randn(9, D_IN)
    net.eval()
    still, _ = run(net, x)
    assert torch.equal(still, run(net, x)[0])
    assert torch.equal(still, run(adapted(lora_dropout=0.0), x)[0])
    net.train()
    dropped, _ = run(net, x)
    assert not torch.allclose(dropped, still)

    # The router sees x undropped; the experts see dropout's own x / (1 - p).
    layer = net[0]
    torch.manual_seed(3)
    thinned = nn.functional.dropout(x, 0.5)
    weights = topk_softmax_loop(x @ layer.router_weights().T, 2)
    a, b = layer.moelora_A["default"].weight, layer.moelora_B["default"].weight
    expected = layer.base_layer(x) + moe_lora_loop(thinned, a, b, weights, (2,) * 4, 3.0)
    # Another order of summation in fp32, on numbers of order ten.
    torch.testing.assert_close(dropped, expected.detach(), rtol=1e-5, atol=1e-5)


# transformers 5.23 has a new name for what its older releases, PEFT and Trainer call by this one.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_activation_checkpointing_changes_no_gradient(mode, use_reentrant):
    """Nor the mask of dropout, which the recomputation draws again."""
    ids = torch.randint(3, 500, (2, 12), generator=torch.Generator().manual_seed(0))

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        config = config_for(target_modules="all-linear", lora_dropout=0.3, gate_rescale=mode)
        model = get_peft_model(tiny_llama(hidden=16), config)
        torch.manual_seed(1)
        for layer in moelora_layers(model).values():
            for _, b in layer.expert_weights():
                b.normal_(std=0.3)
        if checkpointing:
            kwargs = {"use_reentrant": use_reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            model.enable_input_require_grads()
        model.train()
        torch.manual_seed(2)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        assert grad.count_nonzero()
        assert torch.equal(grad, checkpointed[name]), name


# torch._dynamo makes an instance of autograd.Function itself whenever it traces one.
traced_by_dynamo = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)


@traced_by_dynamo
@pytest.mark.parametrize(
    "allocation", ["uniform", f"{__name__}.unequal_ranks"], ids=["equal", "unequal"]
)
@pytest.mark.parametrize("scope", ["weights", "output"])
@pytest.mark.parametrize("mode", MODES)
def test_compiles_without_graph_breaks(mode, scope, allocation):
    net = adapted(gate_rescale=mode, gate_rescale_scope=scope, allocation=allocation)
    x = torch.randn(2, 5, D_IN)
    eager = run(net, x)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    y, grads = run(compiled, x)
    # fullgraph raises on a graph break; the same kernels run, in an order that the partitioner
    # chooses.
    torch.testing.assert_close(y, eager[0], rtol=1e-6, atol=1e-6)
    for name, grad in grads.items():
        expected = eager[1][name.removeprefix("_orig_mod.")]
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)


@traced_by_dynamo
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.slow
def test_runs_compiled_by_inductor(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    net, x = adapted(gate_rescale="sqrt", lora_dropout=0.0), torch.randn(2, 5, D_IN)
    eager_y, eager_grads = run(net, x)
    torch.compiler.reset()
    y, grads = run(torch.compile(net, fullgraph=True), x)
    # Inductor fuses: other roundings in fp32, on numbers up to a hundred.
    torch.testing.assert_close(y, eager_y, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        expected = eager_grads[name.removeprefix("_orig_mod.")]
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


def test_routing_is_kept_only_while_somebody_records_and_holds_no_graph():
    net, x = adapted(), torch.randn(2, 5, D_IN)
    net(x)
    assert net[0].last_routing == {}
    net[0].record_routing = True
    net(x)
    first = net[0].last_routing["default"]
    assert first.weights.shape == (10, 4)
    assert not any(t.requires_grad for t in (first.logits, first.probs, first.weights))
    net(x[:1])
    assert net[0].last_routing["default"].weights.shape == (5, 4)  # overwritten, not appended


def test_only_linear_maps_can_carry_experts():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 4)

    with pytest.raises(
        ValueError, match=r"^Cannot adapt Embedding: experts need a linear map; remove"
    ):
        get_peft_model(Net(), config_for(target_modules=["table"]))
