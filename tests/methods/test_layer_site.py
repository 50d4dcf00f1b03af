"""Site "layer": one decision per decoder layer, whose experts are the layer's target modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapted_llama import cache_of
from peft import get_peft_model
from tiny import tiny_llama
from torch import Tensor, nn

from moelora_plugin import MoeLoraConfig
from moelora_plugin.analysis import routing_statistics
from moelora_plugin.errors import ConfigError, ExportError
from moelora_plugin.model import moelora_layers, routed_layers
from moelora_plugin.ops.reference import ReferenceLinear, gated_linear_loop, topk_softmax_loop

H, T = 6, 5
SILU = nn.functional.silu


class Layer(nn.Module):
    """Three linears, of which the first reads the layer's input."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(H, 8)
        self.two = nn.Linear(8, 4, bias=False)
        self.three = nn.Linear(4, H)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.three(SILU(self.two(SILU(self.one(x)))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(H, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def config_for(**keys: Any) -> MoeLoraConfig:
    defaults = {"r": 2, "top_k": 2, "lora_alpha": 6, "lora_dropout": 0.0}
    targets = {"target_modules": ["one", "two", "three"]}
    return MoeLoraConfig(site="layer", **{**defaults, **targets, **keys})


def randomize(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for layer in moelora_layers(model).values():
        for a, b in layer.expert_weights():
            a.normal_(std=0.5)
            b.normal_(std=0.5)
    for layer in routed_layers(model).values():
        for gate in layer.moelora_gate.parameters():
            gate.data.normal_()
    return model


def adapted(**keys: Any) -> nn.Module:
    torch.manual_seed(0)
    net = Net().double()
    get_peft_model(net, config_for(**keys), autocast_adapter_dtype=False)
    return randomize(net)


# Another order of summation: some tens of roundings of numbers up to a hundred.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def reference(linear: nn.Module) -> ReferenceLinear:
    base = linear.base_layer
    tensors = linear.tensors()
    return ReferenceLinear(base.weight, base.bias, [(tensors["A"], tensors["B"])], 3.0)


@pytest.mark.parametrize("mode", ["none", "sqrt", "exact"])
def test_the_layer_is_the_loop_s_mixture_of_modules(mode):
    net = adapted(gate_rescale=mode)
    x = torch.randn(2, T, H, dtype=torch.float64, requires_grad=True)
    y = net(x)

    slow = x.flatten(0, 1)
    for layer in net.layers:
        weights = topk_softmax_loop(slow @ layer.one.moelora_gate["default"].weight.T, 2)
        h = slow
        for column, name in enumerate(["one", "two", "three"]):
            h = gated_linear_loop(reference(getattr(layer, name)), h, weights[:, column])
            h = h if name == "three" else SILU(h)
        slow = slow + h
    slow = net.head(slow).view_as(y)
    torch.testing.assert_close(y, slow, **CLOSE)
    if mode != "none":
        return  # the exponents are the linear's own, tested there
    parameters = {n: p for n, p in net.named_parameters() if p.requires_grad}
    assert len(parameters) == 2 * (3 * 2 + 1)  # per layer: a pair per module and one router
    fast = torch.autograd.grad(y.square().sum(), [*parameters.values(), x])
    expected = torch.autograd.grad(slow.square().sum(), [*parameters.values(), x])
    for name, grad, wanted in zip([*parameters, "x"], fast, expected, strict=True):
        assert grad.count_nonzero()
        torch.testing.assert_close(grad, wanted, **CLOSE, msg=name)


def test_by_hand():
    """Of two modules the second alone is on; both add 1 to what they are given."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)

        def forward(self, x):
            return self.b(self.a(x))

    net = nn.Module()
    net.layers = nn.ModuleList([Two()])
    layer = net.layers[0]
    for linear in (layer.a, layer.b):
        linear.weight.data.fill_(1.0)
    config = config_for(r=1, top_k=1, lora_alpha=1, target_modules=["a", "b"])
    get_peft_model(net, config)
    for linear in (layer.a, layer.b):
        ((a, b),) = linear.expert_weights()
        a.fill_(1.0)
        b.fill_(1.0)
    layer.a.router_weights().copy_(torch.tensor([[-1.0], [1.0]]))
    # x = 2: logits (-2, 2), so module b is on with gate 1: 2 -> 2 -> 2 + 2 = 4.
    # x = -2: logits (2, -2), module a: -2 -> -4 -> -4.
    y = layer(torch.tensor([[[2.0], [-2.0]]]))
    assert y.flatten().tolist() == [4.0, -4.0]


def test_top_k_counts_modules_and_num_experts_is_not_read():
    net = adapted(num_experts=2, top_k=2)
    assert net.layers[0].one.router_weights().shape == (3, H)
    with pytest.raises(ConfigError, match="top_k=4 is more than the 3 target modules of a layer"):
        adapted(num_experts=9, top_k=4)


def test_a_module_outside_of_the_layers_is_always_on():
    net = adapted(target_modules=["one", "two", "head"])
    head, x = net.head, torch.randn(4, H, dtype=torch.float64)
    assert not head.moelora_gate
    torch.testing.assert_close(
        head(x), gated_linear_loop(reference(head), x, torch.ones(4).double()), **CLOSE
    )


def test_towers_have_layers_of_their_own():
    """The first number of a name counts layers; the text's layer 0 is not the image's."""
    net = nn.Module()
    net.image, net.text = Net(), Net()
    get_peft_model(net, config_for())
    routers = [name for name, layer in routed_layers(net).items() if layer.moelora_router]
    assert routers == [f"{tower}.layers.{n}.one" for tower in ("image", "text") for n in (0, 1)]


def test_the_decision_is_of_the_same_pass():
    net = adapted()
    layer, x = net.layers[0], torch.randn(1, T, H, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"ran before layers\.0\.one, which decides for it"):
        layer.two(torch.randn(1, T, 8, dtype=torch.float64))
    net(x)
    with pytest.raises(ConfigError, match=r"got 3 tokens, but layers\.0\.one, which decides"):
        layer.two(torch.randn(1, 3, 8, dtype=torch.float64))

    class Reversed(Net):
        def forward(self, input_ids):
            x = nn.functional.one_hot(input_ids, H).float()
            for layer in self.layers:
                x = x + layer.one(x).mean() + layer.three(x[..., :4])
            return x

    ids = torch.randint(0, H, (2, T))
    torch.manual_seed(0)
    net = Reversed()
    get_peft_model(net, config_for(target_modules=["one", "three"], site_kwargs={"owner": "three"}))
    with pytest.raises(ConfigError, match=r"ran before layers\.0\.three"):
        net(ids)
    net = Reversed()
    get_peft_model(net, config_for(target_modules=["one", "three"], site_kwargs={"owner": "one"}))
    net(ids)
    net.train()(ids).sum().backward()


def test_the_last_decision_of_another_call_is_not_taken():
    """Where the owner is left out of a later call, that is an error and not the old decision."""

    class Skipping(Net):
        def forward(self, input_ids, skip=False):
            x = nn.functional.one_hot(input_ids, H).float()
            h = self.layers[0].one(x) if not skip else torch.zeros(*x.shape[:2], 8)
            return self.layers[0].two(h)

    net, ids = Skipping(), torch.randint(0, H, (2, T))
    get_peft_model(net, config_for())
    net(ids)
    with pytest.raises(ConfigError, match="ran before"):
        net(ids, skip=True)


def test_a_copy_made_after_training_decides_by_itself():
    net = adapted()
    x = torch.randn(1, T, H, dtype=torch.float64)
    before = net.train()(x)  # leaves a decision with its graph
    twin = copy.deepcopy(net)
    torch.testing.assert_close(twin(x), before, rtol=0, atol=0)
    twin.layers[0].one.router_weights().neg_()
    assert torch.equal(net(x), before)
    assert not torch.equal(twin(x), before)


def test_statistics_and_losses_are_the_owner_s():
    model = get_peft_model(
        tiny_llama(), config_for(target_modules="all-linear", aux_losses={"switch_lb": 0.1})
    )
    assert model.base_model.aux_losses.num_layers == {"default": 2}
    ids = torch.randint(3, 500, (2, 6), generator=torch.Generator().manual_seed(0))
    with routing_statistics(model) as statistics:
        model.train()(input_ids=ids, labels=ids).loss.backward()
    assert [name.rpartition(".")[2] for name in statistics.layers] == ["q_proj", "q_proj"]
    assert all(len(c.selected_E) == 7 and c.tokens == 12 for c in statistics.layers.values())
    for name, layer in routed_layers(model).items():
        assert bool(layer.last_aux_losses) == name.endswith("q_proj")


@pytest.mark.parametrize("loss", ["orthogonal", "contrastive"])
def test_losses_that_compare_experts_do_not_go_with_modules(loss):
    with pytest.raises(ConfigError, match=rf"aux_losses\['{loss}'\] needs"):
        adapted(aux_losses={loss: 1.0}).train()(torch.randn(1, T, H, dtype=torch.float64))


def test_the_gradient_of_a_loss_enters_once():
    net = adapted(aux_losses={"z": 0.3}).train()
    x = torch.randn(1, T, H, dtype=torch.float64)
    net(x).mul(0.0).sum().backward()
    # The last layer's: the first one's gradient holds this loss as well, through its output.
    gate, x = net.layers[1].one.moelora_gate["default"].weight, net.layers[0](x)
    loss = 0.3 / 2 * (x[0] @ gate.T).logsumexp(-1).square().mean()  # the mean over two layers
    torch.testing.assert_close(gate.grad, torch.autograd.grad(loss, gate)[0], **CLOSE)


def test_decoding_goes_by_the_prompt_s_decision():
    """With router_input "prompt" the tokens that follow add nothing to the decision."""
    config = config_for(target_modules="all-linear", router_input="prompt", top_k=3)
    model = randomize(get_peft_model(tiny_llama(), config)).eval()
    ids = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    seen = []
    owners = [layer for layer in routed_layers(model).values() if layer.moelora_router]
    owners[0].record_routing = True
    with torch.no_grad():
        past = cache_of(model(input_ids=ids[:, :6], use_cache=True))
        seen.append(owners[0].last_routing["default"].weights.view(2, 6, 7))
        for position in range(6, 9):
            past = cache_of(model(input_ids=ids[:, position : position + 1], **past))
            seen.append(owners[0].last_routing["default"].weights.view(2, 1, 7))
    assert (seen[0] > 0).sum(-1).eq(3).all()
    for weights in seen:
        assert torch.equal(weights, seen[0][:, :1].expand_as(weights))
    generated = model.generate(input_ids=ids[:, :6], max_new_tokens=4, do_sample=False)
    assert generated.shape == (2, 10)


def test_merging_needs_fixed_gates():
    with pytest.raises(ExportError, match="follow the input"):
        adapted().layers[0].two.merge()
    net = adapted(router_score="static", router_input="none")
    x = torch.randn(1, T, H, dtype=torch.float64)
    y = net(x)
    for linear in moelora_layers(net).values():
        linear.merge()
    torch.testing.assert_close(net(x), y, **CLOSE)
    for linear in moelora_layers(net).values():
        linear.unmerge()
    torch.testing.assert_close(net(x), y, **CLOSE)


def test_mean_gates_are_the_owner_s_columns():
    net = adapted()
    means = {id(net.layers[0].one): torch.tensor([0.5, 0.3, 0.2])}
    for column, name in enumerate(["one", "two", "three"]):
        linear = getattr(net.layers[0], name)
        source = linear.moelora_gate_source["default"]
        weights = source.mean_weights(linear, "default", lambda layer: means[id(layer)])
        assert weights.tolist() == means[id(net.layers[0].one)][column : column + 1].tolist()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"target_modules": ["head"]}, "site 'layer' needs target_modules inside numbered layers"),
        (
            {"site_kwargs": {"owner": "four"}},
            r"site_kwargs\['owner'\]='four' matches none of layers.0's target modules: one, two",
        ),
        ({"site_kwargs": {"first": "one"}}, "site_kwargs has no key 'first'"),
    ],
)
def test_what_does_not_go_is_said_at_injection(keys, message):
    with pytest.raises(ConfigError, match=message):
        adapted(**keys)
