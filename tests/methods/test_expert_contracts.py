"""What every expert kind must do, over the dict of them: a new entry is tested without a new test.

A kind that differs where it may says so in `EXCEPTIONS`.
"""

from __future__ import annotations

import copy
import functools
import itertools
import pickle

import pytest
import torch
from fixed_gates import Three
from peft import PeftModel, get_peft_model
from tiny import tiny_llama
from torch import nn

from moelora_plugin import MoeLoraConfig
from moelora_plugin.errors import ConfigError, ExportError
from moelora_plugin.experts import EXPERTS
from moelora_plugin.model import moelora_layers
from moelora_plugin.types import ExpertInput, Gates, LayerPlan

D = 12  # in and out features; three experts divide it
MODES = list(itertools.product(["none", "sqrt", "exact"], ["weights", "output"]))

# Further configurations of a kind, held to the same contracts.
VARIANTS = {
    "lora, frozen": ("lora", {"frozen": True}),
    "rank, joint": ("rank", {"metric": "joint"}),
    "pools, conditional": ("pools", {"selection": "conditional"}),
    "mixed_factors, split": ("mixed_factors", {"n_splits": 3}),
    "tree, three": ("tree", {"children": [3, 2], "fan_out": [2, 1]}),
    "tensor, order 3": ("tensor", {"order": 3}),
}
KINDS = {**{name: (name, {}) for name in EXPERTS}, **VARIANTS}

EXCEPTIONS = {
    # Each expert has slices of its own, so experts cannot change places.
    "no permutation": {"block_diagonal", "mixed_factors, split"},
    # The experts' own gates (tree, pools) or the base's output (vector, dora) make the update.
    "no merge": {"vector", "dora", "tree", "tree, three", "pools", "pools, conditional"},
    # Where the experts' tensors are something else than rows of A and columns of B.
    "not bilinear": {"vector", "tree", "tree, three", "tensor", "tensor, order 3"},
    # Nothing of it trains.
    "frozen": {"lora, frozen"},
}

every_kind = pytest.mark.parametrize("case", KINDS)
mergeable = pytest.mark.parametrize("case", sorted(set(KINDS) - EXCEPTIONS["no merge"]))


def config_for(case: str, **keys) -> MoeLoraConfig:
    name, options = KINDS[case]
    defaults = {
        "r": 1, "num_experts": 3, "top_k": 2, "lora_alpha": 2, "lora_dropout": 0.0,
        "expert": name, "expert_kwargs": options,
    }  # fmt: skip
    return MoeLoraConfig(**{"target_modules": ["0", "2"], **defaults, **keys})


def kind_of(case: str, rank=1):
    name, options = KINDS[case]
    return EXPERTS[name](LayerPlan(3, 2, (rank,) * 3, 2.0), D, D, **options)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)).double()


def randomize(model: nn.Module, std: float = 0.5) -> nn.Module:
    """Every tensor of every adapter at random, frozen ones too."""
    torch.manual_seed(1)
    for layer in moelora_layers(model).values():
        for adapter in layer.moelora_mixture:
            for tensor in layer.tensors(adapter).values():
                tensor.data.normal_(std=std)
            layer.router_weights(adapter).normal_()
    return model


def adapted(case: str, dtype=torch.float64, fresh=False, **keys) -> nn.Module:
    model = get_peft_model(network(), config_for(case, **keys), autocast_adapter_dtype=False)
    return (model if fresh else randomize(model)).to(dtype)


def batch() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(2, 5, D, dtype=torch.float64)


def run(model, x, autocast=False):
    """Output and every gradient, x's included."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    (y.to(torch.promote_types(y.dtype, torch.float32)) ** 2).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return y.detach(), {**grads, "x": x.grad}


def assert_equal(found, expected):
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, grad in found[1].items():
        assert torch.equal(grad, expected[1][name]), name


@every_kind
def test_shapes_match_the_tensors_and_only_what_is_not_frozen_trains(case):
    model = adapted(case, fresh=True)
    for layer in moelora_layers(model).values():
        kind = layer.moelora_mixture["default"].experts
        tensors = layer.tensors()
        assert {name: tuple(t.shape) for name, t in tensors.items()} == kind.shapes()
        for name, tensor in tensors.items():
            assert tensor.requires_grad == (name not in kind.frozen), name


@every_kind
def test_a_new_adapter_changes_nothing_at_all(case):
    x = batch()
    model = adapted(case, fresh=True)
    assert torch.equal(model(x), network()(x))
    for layer in moelora_layers(model).values():  # and not because memory happened to be zero
        assert all(torch.isfinite(t).all() for t in layer.tensors().values())


@every_kind
@pytest.mark.parametrize(("rescale", "scope"), MODES)
def test_the_value_and_the_router_s_gradient_are_the_same_in_every_mode(case, rescale, scope):
    kind = kind_of(case)
    torch.manual_seed(0)
    tensors = {n: torch.randn(s, dtype=torch.float64) for n, s in kind.shapes().items()}
    tensors = {n: t.requires_grad_(n not in kind.frozen) for n, t in tensors.items()}
    x, weight = batch().flatten(0, 1).requires_grad_(), torch.randn(D, D, dtype=torch.float64)
    base = (x @ weight.T).detach().requires_grad_()
    gates = torch.softmax(torch.randn(10, 3, dtype=torch.float64), -1).requires_grad_()
    inputs = ExpertInput(x, base, lambda: weight)
    results = []
    for mode, where in (("none", "weights"), (rescale, scope)):
        update = kind.update(tensors, inputs, Gates(gates, 2.0, mode, where))
        own = [t for n, t in tensors.items() if n.startswith(("gate", "keys", "condition"))]
        upstream = torch.ones_like(update)
        grads = torch.autograd.grad(
            update, [gates, *own], upstream, retain_graph=True, allow_unused=True
        )
        of_x = torch.autograd.grad(update, [x, base], upstream, allow_unused=True)
        results.append((update, grads, of_x))
    (update, grads, of_x), (other, other_grads, other_of_x) = results
    # What is added to the value is exactly zero.
    assert torch.equal(update, other)
    for got, want in zip(other_grads, grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)  # sums in another order
    if scope == "weights":
        for got, want in zip(other_of_x, of_x, strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@every_kind
@pytest.mark.parametrize(("rescale", "scope"), MODES)
def test_the_gradient_reaches_what_trains_and_nothing_else(case, rescale, scope):
    model = adapted(case, gate_rescale=rescale, gate_rescale_scope=scope)
    _, grads = run(model, batch())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert "moelora_" in name, name
            assert torch.count_nonzero(grads[name]) > 0, name
        else:
            assert name not in grads, name
    if case in EXCEPTIONS["frozen"]:
        assert all(".moelora_gate." in name for name in grads if name != "x")


@pytest.mark.parametrize(
    "case", sorted(set(KINDS) - EXCEPTIONS["not bilinear"] - EXCEPTIONS["frozen"])
)
def test_experts_that_are_never_selected_do_not_learn(case):
    """Three experts, of which the last has gate 0 for every token, in every mode."""
    kind = kind_of(case)
    torch.manual_seed(0)
    tensors = {n: torch.randn(s, dtype=torch.float64) for n, s in kind.shapes().items()}
    tensors = {n: t.requires_grad_() for n, t in tensors.items()}
    x, weight = batch().flatten(0, 1), torch.randn(D, D, dtype=torch.float64)
    gates = torch.tensor([[0.7, 0.3, 0.0]], dtype=torch.float64).expand(10, 3)
    for mode, scope in MODES:
        update = kind.update(
            tensors, ExpertInput(x, x @ weight.T, lambda: weight), Gates(gates, 2.0, mode, scope)
        )
        # One row per expert, of whichever factor the experts do not share.
        name = "A" if len(tensors["A"]) == 3 else "B"
        (grad,) = torch.autograd.grad(update.sum(), [tensors[name]])
        of_expert = grad if name == "A" else grad.T
        if case != "pools, conditional":  # where an a also speaks for b's at any place
            assert torch.count_nonzero(of_expert[2]) == 0, (mode, scope)
        assert torch.count_nonzero(of_expert[0]) > 0, (mode, scope)


@every_kind
def test_tokens_do_not_see_each_other(case):
    model, x = adapted(case), batch().flatten(0, 1)
    order = torch.randperm(len(x))
    whole = model(x)
    # Matrix products of other sizes may round differently.
    torch.testing.assert_close(model(x[order]), whole[order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x[:1]), whole[:1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x.view(2, 5, D)).flatten(0, 1), whole, rtol=1e-12, atol=1e-12)
    assert model(x[:0]).shape == (0, D)


@pytest.mark.parametrize("case", sorted(set(KINDS) - EXCEPTIONS["no permutation"]))
def test_experts_are_interchangeable(case):
    """Experts and their gates in another order: the same update."""
    kind = kind_of(case)
    torch.manual_seed(0)
    tensors = {n: torch.randn(s, dtype=torch.float64) for n, s in kind.shapes().items()}
    x, weight = batch().flatten(0, 1), torch.randn(D, D, dtype=torch.float64)
    gates = torch.softmax(torch.randn(10, 3, dtype=torch.float64), -1)
    inputs = ExpertInput(x, x @ weight.T, lambda: weight)
    order = torch.tensor([2, 0, 1])
    permuted = {}
    top = len(getattr(kind, "sizes", [0])) - 1
    for name, tensor in tensors.items():
        rank = kind.plan.ranks[0]
        whole = tensor
        if case.startswith("pools"):  # a's go with the gates; b's with the kind's own
            whole = tensor[order] if name == "A" else tensor
        elif case.startswith("tree"):
            dims = {f"A{top}": 0, f"B{top}": 1, f"keys{top}": 0}
            whole = tensor.index_select(dims[name], order) if name in dims else tensor
        elif case.startswith("tensor"):
            whole = tensor[:, order]
        else:
            dim = next((d for d, size in enumerate(tensor.shape) if size == 3 * rank), None)
            whole = tensor if dim is None else tensor.index_select(dim, order)
        permuted[name] = whole
    expected = kind.update(tensors, inputs, Gates(gates, 2.0))
    found = kind.update(permuted, inputs, Gates(gates[:, order], 2.0))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(kind.update(tensors, inputs, Gates(gates[:, order], 2.0)), expected)


@every_kind
def test_the_tensors_are_taken_apart_as_views(case):
    model = adapted(case)
    layer = next(iter(moelora_layers(model).values()))
    pairs = layer.expert_weights()
    assert len(pairs) in (0, 3)
    before = {name: tensor.clone() for name, tensor in layer.tensors().items()}
    for a, b in pairs:
        a.add_(1)
        b.add_(1)
        assert a.shape[0] == b.shape[1]
    moved = {n for n, t in layer.tensors().items() if not torch.equal(t, before[n])}
    assert moved == ({"A", "B"} if pairs else set())


@every_kind
def test_outputs_per_expert_add_up_to_the_update_or_are_refused(case):
    kind = kind_of(case)
    torch.manual_seed(0)
    tensors = {n: torch.randn(s, dtype=torch.float64) for n, s in kind.shapes().items()}
    x, weight = batch().flatten(0, 1), torch.randn(D, D, dtype=torch.float64)
    if not kind.sums_outputs:
        with pytest.raises(ConfigError, match=r"aux_losses.*change expert"):
            kind.outputs(tensors, x, 2.0)
        return
    gates = torch.rand(10, 3, dtype=torch.float64)
    inputs = ExpertInput(x, x @ weight.T, lambda: weight)
    found = torch.einsum("te,teo->to", gates, kind.outputs(tensors, x, 2.0))
    torch.testing.assert_close(
        found, kind.update(tensors, inputs, Gates(gates, 2.0)), rtol=1e-12, atol=1e-12
    )


@mergeable
def test_a_merged_weight_is_the_mixture_of_fixed_gates(case):
    keys = {"router": "fixed_gates.Three"}
    x, base = batch(), network()
    unmerged = adapted(case, **keys)(x)
    assert not torch.allclose(unmerged, base(x))
    model = adapted(case, **keys)
    merged = model.merge_and_unload()(x)
    # One product with the merged weight instead of two or three: another order of sums.
    torch.testing.assert_close(merged, unmerged, rtol=1e-11, atol=1e-11)


@mergeable
def test_unmerging_gives_the_base_back(case):
    model, x = adapted(case, router="fixed_gates.Three"), batch()
    before = model(x)
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), before, rtol=1e-11, atol=1e-11)


@mergeable
def test_a_static_update_is_linear_algebra_on_the_kind_alone(case):
    kind = kind_of(case)
    torch.manual_seed(0)
    tensors = {n: torch.randn(s, dtype=torch.float64) for n, s in kind.shapes().items()}
    weights = torch.tensor(Three.gates, dtype=torch.float64)
    x, weight = batch().flatten(0, 1), torch.randn(D, D, dtype=torch.float64)
    inputs = ExpertInput(x, x @ weight.T, lambda: weight)
    update = kind.update(tensors, inputs, Gates(weights.expand(10, 3), 2.0))
    expected = x @ kind.static_update(tensors, weights, 2.0).T
    torch.testing.assert_close(update, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", sorted(EXCEPTIONS["no merge"]))
def test_what_is_no_update_of_the_weight_does_not_merge(case):
    model = adapted(case, router="fixed_gates.Three")
    with pytest.raises(ExportError, match="unmerged"):
        model.merge_and_unload()


@functools.cache
def llama() -> nn.Module:
    return tiny_llama(hidden=24, layers=1, vocab_size=32)


LLAMA = ["q_proj", "down_proj"]  # widths 24 and 48: three experts divide both


@every_kind
def test_saving_and_loading_is_exact(case, tmp_path):
    base = copy.deepcopy(llama())
    model = get_peft_model(base, config_for(case, target_modules=LLAMA, lora_dropout=0.1)).eval()
    randomize(model, std=0.1)
    ids = torch.arange(10).view(2, 5)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    for empty in (False, True):
        loaded = PeftModel.from_pretrained(
            copy.deepcopy(llama()), tmp_path, low_cpu_mem_usage=empty
        ).eval()
        # The tensors are compared bit for bit below; products of them may differ with their place
        # in memory, which decides the kernel.
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(
            moelora_layers(model).values(), moelora_layers(loaded).values(), strict=True
        ):
            assert mine.tensors().keys() == theirs.tensors().keys()
            for name, tensor in mine.tensors().items():
                assert torch.equal(tensor, theirs.tensors()[name]), name
                assert theirs.tensors()[name].device.type == "cpu"


@every_kind
def test_it_is_made_on_the_meta_device(case):
    kind = kind_of(case)
    tensors = {n: torch.empty(s, device="meta") for n, s in kind.shapes().items()}
    kind.reset(tensors)
    assert all(tensor.is_meta for tensor in tensors.values())


@every_kind
def test_the_same_seed_gives_the_same_adapter_and_another_another(case):
    def state(seed):
        net = network()
        torch.manual_seed(seed)
        return get_peft_model(net, config_for(case)).state_dict()

    first, second, other = state(3), state(3), state(4)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@every_kind
@pytest.mark.parametrize("rescale", ["none", "sqrt"])
def test_copies_and_pickles_compute_the_same(case, rescale):
    model, x = adapted(case, gate_rescale=rescale), batch()
    expected = run(model, x)
    assert_equal(run(copy.deepcopy(model), x), expected)
    assert_equal(run(pickle.loads(pickle.dumps(model)), x), expected)


@every_kind
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_is_the_same(case, reentrant):
    model, x = adapted(case, gate_rescale="sqrt"), batch()
    expected = run(model, x)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=reentrant)

    y, grads = run(Checkpointed(), x)
    assert_equal((y, {n.removeprefix("inner."): g for n, g in grads.items()}), expected)


# Rounding of every step to 8 bits of mantissa, through three layers; gates near a tie may select
# another expert for a token, so the tokens are compared as a whole and not entry by entry.
HALF = 0.1


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@every_kind
@pytest.mark.parametrize("rescale", ["none", "sqrt"])
def test_bfloat16_and_autocast_follow_double_precision(case, rescale):
    keys = {"gate_rescale": rescale, "router": "fixed_gates.Three"}

    # A child of a tree and a b of the pools are selected by values near each other; one of them
    # chosen differently is no rounding error, so their own gates are made clear.
    def clear(model):
        for layer in moelora_layers(model).values():
            for name, tensor in layer.tensors().items():
                if name.startswith(("gate_B", "keys")):
                    tensor.data.mul_(20)
                elif name.startswith("W") or name == "condition":
                    tensor.data.mul_(0.2)
        return model

    x = batch()
    expected = run(clear(adapted(case, **keys)), x)
    half = run(clear(adapted(case, dtype=torch.bfloat16, **keys)), x.bfloat16())
    model = clear(adapted(case, dtype=torch.float32, **keys))
    under_autocast = run(model, x.float(), autocast=True)
    for y, grads in (half, under_autocast):
        assert relative(y, expected[0]) < HALF
        for name, grad in grads.items():
            assert torch.isfinite(grad).all(), name
    # Parameters keep their own dtype in the gradient.
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert all(g.dtype == dtypes[n] for n, g in under_autocast[1].items() if n != "x")


@every_kind
def test_several_adapters_stay_apart(case):
    model = get_peft_model(network(), config_for(case), autocast_adapter_dtype=False)
    model.add_adapter("other", config_for(case), autocast_adapter_dtype=False)
    randomize(model)
    x = batch()
    first = model(x)
    model.set_adapter("other")
    assert not torch.allclose(model(x), first)
    model.set_adapter("default")
    assert torch.equal(model(x), first)


@every_kind
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("rescale", ["none", "sqrt"])
def test_it_compiles_whole(case, rescale):
    model, x = adapted(case, dtype=torch.float32, gate_rescale=rescale), batch().float()
    expected = run(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y, grads = run(compiled, x)
    # The compiler decomposes products into other sums, in float32.
    torch.testing.assert_close(y, expected[0], rtol=1e-4, atol=1e-5)
    grads = {n.removeprefix("_orig_mod."): g for n, g in grads.items()}
    assert grads.keys() == expected[1].keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[1][name], rtol=1e-3, atol=1e-4)
