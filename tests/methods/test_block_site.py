"""Site "block": a mixture of whole feed-forward blocks, held to a loop over tokens and experts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_llama
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig, PhiConfig
from transformers.activations import ACT2FN
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi.modeling_phi import PhiMLP
from transformers.pytorch_utils import Conv1D

from moelora_plugin import MoeLoraConfig, build_optimizer
from moelora_plugin.analysis import routing_statistics
from moelora_plugin.errors import ConfigError, ExportError
from moelora_plugin.layers import MoeLoraLinear
from moelora_plugin.layers.block import BLOCK, MoeLoraBlock
from moelora_plugin.model import moelora_layers, routed_layers
from moelora_plugin.ops.gated_rows import gate_rows, restore_gradient
from moelora_plugin.ops.reference import ReferenceLinear, block_loop, topk_softmax_loop
from moelora_plugin.routers import ROUTERS

H, T = 6, 7
MODES = ["none", "sqrt", "exact"]
SCOPES = ["weights", "output"]
GATED = ["gate_proj", "up_proj", "down_proj"]


class Layer(nn.Module):
    """A decoder layer without attention, so that what is tested is the block."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def llama_mlp() -> tuple[nn.Module, list[str], Any]:
    config = LlamaConfig(hidden_size=H, intermediate_size=10, num_attention_heads=2)
    silu = nn.functional.silu

    def written(linear: Any, x: Tensor) -> Tensor:
        return linear("down_proj", silu(linear("gate_proj", x)) * linear("up_proj", x))

    return LlamaMLP(config), GATED, written


def gpt2_mlp() -> tuple[nn.Module, list[str], Any]:
    """Conv1D, and a dropout of its own at the end, which is off here."""
    config = GPT2Config(n_embd=H, n_head=2, resid_pdrop=0.0)
    act = ACT2FN[config.activation_function]
    return (
        GPT2MLP(10, config),
        ["c_fc", "c_proj"],
        lambda lin, x: lin("c_proj", act(lin("c_fc", x))),
    )


def phi_mlp() -> tuple[nn.Module, list[str], Any]:
    """No gate; only the first linear is adapted here."""
    config = PhiConfig(hidden_size=H, intermediate_size=10, num_attention_heads=2)
    act = ACT2FN[config.hidden_act]
    return PhiMLP(config), ["fc1"], lambda lin, x: lin("fc2", act(lin("fc1", x)))


BLOCKS = {"llama": llama_mlp, "gpt2": gpt2_mlp, "phi": phi_mlp}


def config_for(**keys: Any) -> MoeLoraConfig:
    defaults = {"r": 2, "num_experts": 4, "top_k": 2, "lora_alpha": 6, "lora_dropout": 0.0}
    return MoeLoraConfig(site="block", **{"target_modules": GATED, **defaults, **keys})


def randomize(model: nn.Module) -> nn.Module:
    """Every expert and router random."""
    torch.manual_seed(1)
    for layer in moelora_layers(model).values():
        for adapter in layer.moelora_mixture:
            for a, b in layer.expert_weights(adapter):
                a.normal_(std=0.5)
                b.normal_(std=0.5)
    for layer in routed_layers(model).values():
        for gate in layer.moelora_gate.parameters():
            gate.data.normal_()
    return model


def adapted(kind: str = "llama", dtype: torch.dtype = torch.float64, **keys: Any) -> nn.Module:
    torch.manual_seed(0)
    mlp, targets, _ = BLOCKS[kind]()
    for parameter in mlp.parameters():
        parameter.data.normal_(std=0.5)  # GPT-2's own initialisation leaves biases zero
    net = nn.Sequential(Layer(mlp.to(dtype)))
    get_peft_model(
        net, config_for(**{"target_modules": targets, **keys}), autocast_adapter_dtype=False
    )
    return randomize(net)


def reference_of(module: nn.Module, adapter: str = "default") -> ReferenceLinear:
    """A linear of the net, adapted or not, as the oracle takes it."""
    base = getattr(module, "base_layer", module)
    weight = base.weight.T if isinstance(base, Conv1D) else base.weight
    tensors = module.tensors(adapter) if base is not module else {}
    if not tensors:
        return ReferenceLinear(weight, base.bias)
    pairs = zip(tensors["A"].split(2), tensors["B"].split(2, 1), strict=True)
    return ReferenceLinear(weight, base.bias, list(pairs), 3.0)  # s = alpha / r = 6 / 2


def block_of(net: nn.Module) -> MoeLoraBlock:
    return getattr(net[0].mlp, BLOCK)


def expected(net: nn.Module, kind: str, x: Tensor, weights: Tensor, *modes: str) -> Tensor:
    mlp, written = net[0].mlp, BLOCKS[kind]()[2]
    kinds = (MoeLoraLinear, nn.Linear, Conv1D)
    linears = {n: reference_of(m) for n, m in mlp.named_children() if isinstance(m, kinds)}
    return x + block_loop(written, linears, x.flatten(0, -2), weights, *modes).view_as(x)


def grads_of(net: nn.Module, y: Tensor, x: Tensor) -> dict[str, Tensor]:
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(y.square().sum(), [*parameters.values(), x])
    return dict(zip([*parameters, "x"], found, strict=True))


# Another order of summation: some tens of roundings of numbers up to a hundred.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", BLOCKS)
def test_the_block_is_the_loop_s_mixture(kind, mode, scope):
    net = adapted(kind, gate_rescale=mode, gate_rescale_scope=scope)
    x = torch.randn(1, T, H, dtype=torch.float64, requires_grad=True)
    y = net(x)
    gate = block_of(net).moelora_gate["default"].weight
    weights = topk_softmax_loop(x.flatten(0, 1) @ gate.T, 2)
    slow = expected(net, kind, x, weights, mode, scope)
    torch.testing.assert_close(y, slow, **CLOSE)
    fast_grads, slow_grads = grads_of(net, y, x), grads_of(net, slow, x)
    # One pair per adapted linear, one router.
    assert len(fast_grads) == 2 * len(BLOCKS[kind]()[1]) + 2
    for name, grad in fast_grads.items():
        assert grad.count_nonzero()
        torch.testing.assert_close(grad, slow_grads[name], **CLOSE, msg=name)


OPTIONS = {"hard": {"top_k": 1}, "relu": {}, "sigmoid": {}}


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_s_gates_weigh_the_block_s_experts(router):
    """Rows from `expert_ids` and rows from the gates alike are what the gates say."""
    net = adapted(router=router, **OPTIONS.get(router, {})).eval()
    block, x = block_of(net), torch.randn(2, T, H, dtype=torch.float64, requires_grad=True)
    block.record_routing = True
    y = net(x)
    routing = block.last_routing["default"]
    slow = expected(net, "llama", x, routing.weights)
    torch.testing.assert_close(y, slow, **CLOSE)
    # The gates are constants here, so of the gradients only the experts' can be compared.
    # Gates that do not add up to 1 (relu's) make outputs of hundreds, whose squares' roundings
    # would be far above what CLOSE allows for numbers up to a hundred.
    size = y.detach().abs().max()
    fast_grads, slow_grads = (grads_of_experts(net, out / size) for out in (y, slow))
    for name, grad in fast_grads.items():
        torch.testing.assert_close(grad, slow_grads[name], **CLOSE, msg=name)


def grads_of_experts(net: nn.Module, y: Tensor) -> dict[str, Tensor]:
    names = {n: p for n, p in net.named_parameters() if ".moelora_A." in n or ".moelora_B." in n}
    found = torch.autograd.grad(y.square().sum(), list(names.values()))
    return dict(zip(names, found, strict=True))


def test_by_hand():
    """Two experts of rank 1 on a block that doubles, x = (1, 1), gates 1/4 and 3/4."""

    class Double(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Linear(2, 2, bias=False)
            self.w.weight.data = 2 * torch.eye(2)

        def forward(self, x):
            return self.w(x).relu()

    net = nn.Sequential(Layer(Double()))
    config = config_for(r=1, num_experts=2, lora_alpha=1, target_modules=["w"])
    get_peft_model(net, config)
    (a0, b0), (a1, b1) = net[0].mlp.w.expert_weights()
    a0.copy_(torch.tensor([[1.0, 0.0]]))
    b0.copy_(torch.tensor([[1.0], [-5.0]]))
    a1.copy_(torch.tensor([[0.0, 1.0]]))
    b1.copy_(torch.tensor([[2.0], [0.0]]))
    block_of(net).router_weights().copy_(torch.tensor([[0.0, 0.0], [torch.tensor(3.0).log(), 0]]))
    # FFN_0(1, 1) = relu(2 + 1, 2 - 5) = (3, 0); FFN_1(1, 1) = relu(2 + 2, 2) = (4, 2);
    # a mixture inside the linear would be relu(2 + 1/4 + 3/2, 2 - 5/4) = (3.75, 0.75) instead.
    # 1/4 (3, 0) + 3/4 (4, 2) = (3.75, 1.5), and the residual's (1, 1).
    y = net(torch.ones(1, 1, 2))
    torch.testing.assert_close(y, torch.tensor([[[4.75, 2.5]]]))  # a few roundings of fp32


def test_a_token_without_experts_is_left_to_the_residual():
    """What a capacity takes away, and what a threshold above 1 never selects, adds nothing."""
    net = adapted(router_kwargs={"renormalize": False}, router_modifiers={"capacity": 1}, top_k=1)
    block, x = block_of(net), torch.randn(2, T, H, dtype=torch.float64)
    block.record_routing = True
    y = net(x)
    dropped = (block.last_routing["default"].weights == 0).all(-1).view(2, T)
    assert 2 * (T - 4) <= dropped.sum() < 2 * T  # at most one token for each of four experts
    assert torch.equal(y[dropped], x[dropped])
    assert not torch.equal(y[~dropped], x[~dropped])
    weights = block.last_routing["default"].weights
    torch.testing.assert_close(y, expected(net, "llama", x, weights), **CLOSE)

    net = adapted(router="relu")
    block_of(net).router_weights().zero_()
    assert torch.equal(net(x), x)  # no rows at all
    net(x.requires_grad_()).sum().backward()
    assert not any(p.grad.any() for n, p in net.named_parameters() if ".moelora_A." in n)


def test_padding_is_routed_but_not_counted():
    model = randomize(get_peft_model(tiny_llama(), config_for(aux_losses={"switch_lb": 1.0})))
    ids = torch.randint(3, 500, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad(), routing_statistics(model) as statistics:
        padded = model(input_ids=ids, attention_mask=mask).logits
        alone = model(input_ids=ids[1:, 3:]).logits
    # Attention's kernels for a mask differ from those without, in fp32.
    torch.testing.assert_close(padded[1:, 3:], alone, rtol=1e-3, atol=1e-3)
    name = next(name for name in statistics.layers if name.endswith(BLOCK))
    assert len(statistics.layers) == 2  # one router per layer
    assert statistics.layers[name].tokens == 9 + 3


def test_no_tokens_and_tokens_without_a_batch():
    for keys in ({}, {"router": "top_p"}):
        net, x = adapted(**keys), torch.randn(2, T, H, dtype=torch.float64)
        assert net(x[:0]).shape == (0, T, H)
        torch.testing.assert_close(net(x.flatten(0, 1)), net(x).flatten(0, 1), **CLOSE)


def test_a_token_with_nan_leaves_the_others_as_they_were():
    for keys in ({}, {"router": "top_p"}):
        net, x = adapted(**keys), torch.randn(1, T, H, dtype=torch.float64)
        clean = net(x)
        x[0, 3, 1] = float("nan")
        y = net(x)
        assert y[0, 3].isnan().all()
        others = torch.arange(T) != 3
        # Other rows of the products may be grouped otherwise by the kernels.
        torch.testing.assert_close(y[0, others], clean[0, others], **CLOSE)


def test_the_base_runs_once_per_token_where_a_linear_reads_the_block_s_input():
    net, seen = adapted(), []
    for name in GATED:
        getattr(net[0].mlp, name).base_layer.register_forward_hook(
            lambda module, args, output: seen.append(args[0].shape)
        )
    net(torch.randn(2, T, H, dtype=torch.float64))
    assert seen == [(2, T, H), (2, T, H), (1, 2 * 2 * T, 10)]  # two rows per token


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_tiny_gate_overflows_nothing_in_half_precision(mode, dtype):
    """1e-9^(p - 1) is far above the largest half, the two factors below are not."""
    rows = torch.ones(1, 3, dtype=dtype, requires_grad=True)
    gates = torch.tensor([1e-9], requires_grad=True)
    gate_rows(restore_gradient(rows, gates, mode), gates, mode).sum().backward()
    assert rows.grad.isfinite().all()
    assert gates.grad.isfinite().all()
    # dy g = 1e-9; a half is a multiple of 6e-8.
    assert (rows.grad.float() - 1e-9).abs().max() < 6e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_and_autocast(dtype):
    model = tiny_llama().to(dtype)
    ids = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    peft = randomize(get_peft_model(model, config_for(gate_rescale="sqrt")))
    assert {p.dtype for p in peft.parameters() if p.requires_grad} == {torch.float32}
    assert peft(input_ids=ids).logits.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        loss = peft(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = [p.grad for p in peft.parameters() if p.requires_grad]
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in grads)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_graph_breaks_where_each_token_has_k_experts():
    net = adapted(dtype=torch.float32, gate_rescale="sqrt")
    x = torch.randn(2, T, H, requires_grad=True)
    eager = net(x)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    # The same kernels in another order: roundings of fp32 on numbers up to a hundred.
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    fast, slow = grads_of(net, compiled, x), grads_of(net, eager, x)
    for name, grad in fast.items():
        torch.testing.assert_close(grad, slow[name], rtol=1e-4, atol=1e-4)


# Where a graph breaks, dynamo asks every tensor for .grad.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
def test_compiles_with_rows_that_depend_on_the_data():
    net = adapted(dtype=torch.float32, router="top_p")
    x = torch.randn(2, T, H)
    torch.compiler.reset()
    compiled = torch.compile(net, backend="aot_eager")
    # As above; the number of rows differs from call to call.
    for given in (x, x[:1], -x):
        torch.testing.assert_close(compiled(given), net(given), rtol=1e-5, atol=1e-5)


def test_attention_gets_a_plain_lora_that_is_always_on():
    targets = ["q_proj", *GATED]
    for keys, rank in (({}, 2), ({"site_kwargs": {"single_rank": 5}}, 5)):
        model = get_peft_model(tiny_llama(), config_for(target_modules=targets, **keys))
        q_proj = model.base_model.model.model.layers[0].self_attn.q_proj
        assert [len(a) for a, _ in q_proj.expert_weights()] == [rank]
        assert not q_proj.moelora_gate
        randomize(model)
        x = torch.randn(3, 32)
        ((a, b),) = q_proj.expert_weights()
        expected_y = q_proj.base_layer(x) + 6 / rank * x @ a.T @ b.T
        # Another order of summation in fp32, on numbers of order ten.
        torch.testing.assert_close(q_proj(x), expected_y, rtol=1e-5, atol=1e-4)
        q_proj.merge()
        torch.testing.assert_close(q_proj(x), expected_y, rtol=1e-5, atol=1e-4)


def test_auxiliary_losses_enter_once_per_block():
    losses = {"switch_lb": 0.5, "z": 0.25}
    model = get_peft_model(tiny_llama(), config_for(aux_losses=losses)).train()
    assert model.base_model.aux_losses.num_layers == {"default": 2}
    ids = torch.randint(3, 500, (2, 6), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    found = {n for n, layer in routed_layers(model).items() if layer.last_aux_losses}
    assert found == {n for n in routed_layers(model) if n.endswith(BLOCK)}

    net = adapted(aux_losses=losses).train()
    x = torch.randn(1, T, H, dtype=torch.float64)
    net(x).mul(0.0).sum().backward()  # nothing but the losses
    gate = block_of(net).moelora_gate["default"].weight
    logits = x[0] @ gate.T
    share = (topk_softmax_loop(logits, 2) > 0).double().mean(0)
    balance = 4 * (share * logits.softmax(-1).mean(0)).sum()
    loss = 0.5 * balance + 0.25 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(gate.grad, torch.autograd.grad(loss, gate)[0], **CLOSE)


def test_hard_routing_teaches_the_router_by_the_balance_loss_alone():
    """LLaVA-MoLE: gate 1, so the router's gradient is the loss's."""
    keys = {"router": "hard", "top_k": 1, "num_experts": 3, "router_score_kwargs": {"bias": True}}
    ids = torch.randint(3, 500, (2, 6), generator=torch.Generator().manual_seed(0))
    for losses in ({}, {"switch_lb": 0.01}):
        model = randomize(get_peft_model(tiny_llama(), config_for(aux_losses=losses, **keys)))
        model.train()(input_ids=ids, labels=ids).loss.backward()
        for block in (m for m in model.modules() if isinstance(m, MoeLoraBlock)):
            grads = [p.grad for p in block.gate_parameters()]
            assert len(grads) == 2
            assert all((g is not None and bool(g.any())) == bool(losses) for g in grads)


def test_the_optimizer_s_exponent_reaches_the_block():
    """It is the block that applies the gates; its linears' are one-hot."""
    model = get_peft_model(tiny_llama(), config_for())
    blocks = [m for m in model.modules() if isinstance(m, MoeLoraBlock)]
    assert [block.moelora_gate_rescale["default"] for block in blocks] == ["none"] * 2
    build_optimizer(model, "gradamw")
    assert [block.moelora_gate_rescale["default"] for block in blocks] == ["sqrt"] * 2


def test_an_allocation_may_give_each_block_its_own_experts():
    keys = {"allocation": "layers", "allocation_kwargs": {"num_experts": [2, 3], "top_k": 1}}
    model = get_peft_model(tiny_llama(), config_for(**keys))
    blocks = [m for m in model.modules() if isinstance(m, MoeLoraBlock)]
    assert [len(block.router_weights()) for block in blocks] == [2, 3]


def test_one_expert_is_plain_lora_and_merges():
    net = adapted(num_experts=1, top_k=1)
    x = torch.randn(1, T, H, dtype=torch.float64)
    y = net(x)
    torch.testing.assert_close(y, expected(net, "llama", x, torch.ones(T, 1).double()), **CLOSE)
    for linear in moelora_layers(net).values():
        linear.merge()
    torch.testing.assert_close(net(x), y, **CLOSE)


def test_blocks_that_mix_do_not_merge():
    model = get_peft_model(tiny_llama(), config_for())
    with pytest.raises(ExportError, match="whole feed-forward blocks, which do not fold into one"):
        model.merge_and_unload()
    linear = next(iter(moelora_layers(model).values()))
    fixed = adapted(router_score="static", router_input="none")  # fixed gates, but four of them
    with pytest.raises(ExportError, match="whole feed-forward blocks"):
        fixed[0].mlp.up_proj.merge()
    with pytest.raises(ExportError, match="whole feed-forward blocks"):
        linear.moelora_gate_source["default"].mean_weights(linear, "default", lambda _: None)


def test_a_copy_of_a_block_routes_by_itself():
    net = adapted()
    twin = copy.deepcopy(net)
    x = torch.randn(1, T, H, dtype=torch.float64)
    before = net(x)
    block_of(twin).router_weights().neg_()
    assert torch.equal(net(x), before)
    assert not torch.equal(twin(x), before)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, "are in self_attn; add the block's linears"),
        ({"site_kwargs": {"block": "("}}, r"site_kwargs\['block'\]='\(' must be a regular"),
        ({"site_kwargs": {"single_rank": 0}}, r"site_kwargs\['single_rank'\]=0 must be an int"),
        ({"site_kwargs": {"blok": "mlp"}}, "site_kwargs has no key 'blok'; did you mean 'block'"),
        ({"universal_expert": "one"}, "universal_expert='one' does not go with site 'block'"),
        ({"allocation": f"{__name__}.unlike"}, "a block has one router; change allocation"),
    ],
)
def test_what_does_not_go_is_said_at_injection(keys, message):
    with pytest.raises(ConfigError, match=message):
        get_peft_model(tiny_llama(), config_for(**keys))


def unlike(config: MoeLoraConfig, place: Any) -> Any:
    """An allocation that gives the up projection fewer experts."""
    from moelora_plugin.allocation.base import plan_of

    return plan_of(config, 2 if "up_proj" in place.name else 4, 2, 2, 6)


def test_what_does_not_go_is_said_at_the_call():
    net, x = adapted(), torch.randn(1, T, H, dtype=torch.float64)
    net(x)
    with pytest.raises(ConfigError, match="was called outside of its feed-forward block"):
        net[0].mlp.up_proj(x)
    handle = net[0].mlp.down_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net(x)
    handle.remove()
    with pytest.raises(ConfigError, match="was called outside"):  # nothing is left of that call
        net[0].mlp.up_proj(x)
    with pytest.raises(ConfigError, match=r"aux_losses\['orthogonal'\] needs experts"):
        adapted(aux_losses={"orthogonal": 1.0})
    with pytest.raises(ConfigError, match="got 5 features, but its first linear reads 6"):
        net[0].mlp(x[..., :5])

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(H, H)

        def forward(self, x, residual):
            return self.fc(x) + residual

    net = nn.Sequential(nn.ModuleDict({"mlp": Residual()}))
    get_peft_model(net, config_for(target_modules=["fc"]))
    with pytest.raises(ConfigError, match="Residual takes more tensors than its input"):
        net[0]["mlp"](torch.randn(1, 2, H), torch.randn(1, 2, H))

    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(H, H)

        def forward(self, x):
            return self.fc(x[:, 1:])

    net = nn.Sequential(nn.ModuleDict({"mlp": Shift()}))
    get_peft_model(net, config_for(target_modules=["fc"]))
    with pytest.raises(ConfigError, match="it mixes tokens or routes them itself"):
        net[0]["mlp"](torch.randn(1, 3, H))


def test_two_adapters_cannot_mix_in_one_block():
    model = get_peft_model(tiny_llama(), config_for())
    model.add_adapter("other", config_for())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match="cannot be active together with another"):
        model(input_ids=torch.tensor([[3, 4]]))


def test_the_input_may_come_by_name_and_hooks_of_others_see_tokens():
    net, x, seen = adapted(), torch.randn(1, T, H, dtype=torch.float64), []
    expected_y = net[0].mlp(x)
    assert torch.equal(net[0].mlp(x=x), expected_y)

    plain = nn.Sequential(Layer(llama_mlp()[0]))
    register = plain[0].mlp.register_forward_hook
    register(lambda module, args, output: seen.append(output.shape))
    get_peft_model(plain, config_for())
    register(lambda module, args, output: seen.append(output.shape))
    plain(torch.randn(1, T, H))
    assert seen == [(1, T, H), (1, T, H)]
