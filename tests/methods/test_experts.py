"""Each expert kind: against its slow oracle in value and every gradient, by hand, and its options.

What holds for every kind stands in `test_expert_contracts.py`.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from peft import LoraConfig, PolyConfig, get_peft_model
from torch import nn

from moelora_plugin import MoeLoraConfig
from moelora_plugin.errors import ConfigError
from moelora_plugin.experts import EXPERTS
from moelora_plugin.model import moelora_layers
from moelora_plugin.ops import reference
from moelora_plugin.types import ExpertInput, Gates, LayerPlan

TOKENS, D_IN, D_OUT, S = 7, 12, 8, 1.7
MODES = list(itertools.product(["none", "sqrt", "exact"], ["weights", "output"]))
# Sums run in another order than in the loops, over a few dozen terms of order one.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def plan_of(experts=4, top_k=2, rank=2, ranks=None) -> LayerPlan:
    return LayerPlan(experts, top_k, ranks or (rank,) * experts, alpha=4.0)


def drawn(kind, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Every tensor of a kind at random, so that nothing hides behind a zero."""
    return {name: torch.randn(shape, dtype=dtype) for name, shape in kind.shapes().items()}


def some_inputs(tokens=TOKENS, d_in=D_IN, d_out=D_OUT, dtype=torch.float64) -> ExpertInput:
    weight = torch.randn(d_out, d_in, dtype=dtype)
    x = torch.randn(tokens, d_in, dtype=dtype)
    return ExpertInput(x, x @ weight.T, lambda: weight)


def some_gates(experts=4, top_k=2, tokens=TOKENS, dtype=torch.float64) -> torch.Tensor:
    return reference.topk_softmax_loop(torch.randn(tokens, experts, dtype=dtype), top_k)


def lora(kind, inputs, tensors, weights):
    return reference.lora_terms(weights, kind.plan.ranks, S)


def of_rank(terms):
    return lambda kind, inputs, tensors, weights: terms(weights, kind.rank, S)


def dora(kind, inputs, tensors, weights):
    return reference.dora_terms(weights, kind.plan.ranks, S, inputs.base_weight())


def pools(kind, inputs, tensors, weights):
    return reference.pool_terms(
        weights, S, inputs.x, tensors, kind.plan.top_k, kind.condition_weight
    )


def mixed(kind, inputs, tensors, weights):
    return reference.mixed_factor_terms(weights, kind.rank, S, kind.n_splits)


# (kind, plan, options, what its terms are)
CASES = {
    "lora": ("lora", plan_of(), {}, lora),
    "lora, unequal": ("lora", plan_of(ranks=(1, 3, 2, 2)), {}, lora),
    "shared_a": ("shared_a", plan_of(), {}, of_rank(reference.shared_a_terms)),
    "shared_b": ("shared_b", plan_of(), {}, of_rank(reference.shared_b_terms)),
    "rank": ("rank", plan_of(rank=1), {}, lora),
    "frozen_sparse_a": ("frozen_sparse_a", plan_of(rank=1), {}, lora),
    "block_diagonal": ("block_diagonal", plan_of(), {}, of_rank(reference.block_diagonal_terms)),
    "vector": ("vector", plan_of(), {}, lambda k, i, t, w: reference.vector_terms(w, S)),
    "dora": ("dora", plan_of(), {}, dora),
    "dora, unequal": ("dora", plan_of(ranks=(1, 3, 2, 2)), {}, dora),
    "mixed_factors": ("mixed_factors", plan_of(), {}, mixed),
    "mixed_factors, split": ("mixed_factors", plan_of(), {"n_splits": 2}, mixed),
    "tensor": ("tensor", plan_of(), {}, of_rank(reference.tensor_terms)),
    "tensor, order 3": ("tensor", plan_of(), {"order": 3}, of_rank(reference.tensor_terms)),
    "pools": ("pools", plan_of(rank=1), {}, pools),
    "pools, conditional": (
        "pools",
        plan_of(rank=1),
        {"selection": "conditional", "condition_weight": 0.7},
        pools,
    ),
}


def test_every_kind_has_an_oracle():
    assert {name for name, *_ in CASES.values()} | {"tree"} == set(EXPERTS)


def gradients(output, upstream, named):
    grads = torch.autograd.grad(output, list(named.values()), upstream, allow_unused=True)
    return dict(zip(named, grads, strict=True))


def assert_same(fast, slow, leaves):
    upstream = torch.randn_like(fast)
    torch.testing.assert_close(fast, slow, **CLOSE)
    found, expected = gradients(fast, upstream, leaves), gradients(slow, upstream, leaves)
    for name in leaves:
        assert (found[name] is None) == (expected[name] is None), name
        if found[name] is not None:
            torch.testing.assert_close(
                found[name], expected[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize(("rescale", "scope"), MODES)
@pytest.mark.parametrize("case", CASES)
def test_equals_its_oracle(case, rescale, scope):
    name, plan, options, terms = CASES[case]
    torch.manual_seed(0)
    kind = EXPERTS[name](plan, D_IN, D_OUT, **options)
    tensors = {n: t.requires_grad_() for n, t in drawn(kind).items()}
    inputs, weights = some_inputs(), some_gates(dtype=torch.float64)
    if case == "mixed_factors, split":  # every slice has a selected skill
        weights = torch.softmax(torch.randn_like(weights), -1)
    # The base's output is a leaf of its own, so that what it receives is seen apart.
    leaves = {"x": inputs.x, "base": inputs.base_output.detach(), "gates": weights}
    leaves = {n: t.requires_grad_() for n, t in leaves.items()}
    inputs = ExpertInput(leaves["x"], leaves["base"], inputs.base_weight)
    fast = kind.update(tensors, inputs, Gates(weights, S, rescale, scope))
    slow = reference.sum_of_terms(
        terms(kind, inputs, tensors, weights), inputs.x, inputs.base_output, tensors, rescale, scope
    )
    assert_same(fast, slow, {**leaves, **tensors})


@pytest.mark.parametrize(("rescale", "scope"), MODES)
@pytest.mark.parametrize(
    ("children", "fan_out", "activation"),
    [(4, 2, "tanh"), ([3, 5], [2, 3], "tanh"), (4, 2, "identity"), ([3, 2], [1, 2], "relu")],
)
def test_a_tree_equals_its_recursion(children, fan_out, activation, rescale, scope):
    torch.manual_seed(0)
    kind = EXPERTS["tree"](
        plan_of(3, 2), D_IN, D_OUT, children=children, fan_out=fan_out, activation=activation,
        gate_width=5,
    )  # fmt: skip
    tensors = {n: t.mul_(0.3).requires_grad_() for n, t in drawn(kind).items()}
    weights = some_gates(3).requires_grad_()
    inputs = some_inputs()
    inputs.x.requires_grad_()
    fast = kind.update(tensors, inputs, Gates(weights, S, rescale, scope))
    functions = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda v: v}
    slow = reference.tree_loop(
        inputs, tensors, weights, kind.fan_outs, 2, S, functions[activation], rescale, scope
    )
    assert_same(fast, slow, {"x": inputs.x, "gates": weights, **tensors})


def test_gradcheck_of_every_kind():
    """The ordinary gradient by finite differences, which know nothing of our formulas."""
    for name in EXPERTS:
        torch.manual_seed(1)
        kind = EXPERTS[name](plan_of(rank=1), 4, 4)
        tensors = drawn(kind)
        # Every gate is positive: next to zero, what is selected jumps.
        inputs, weights = some_inputs(3, 4, 4), some_gates(top_k=4, tokens=3)

        def update(x, base, gates, *values, kind=kind, inputs=inputs, names=tuple(tensors)):
            given = ExpertInput(x, base, inputs.base_weight)
            return kind.update(dict(zip(names, values, strict=True)), given, Gates(gates, S))

        leaves = [inputs.x, inputs.base_output, weights, *tensors.values()]
        if name == "dora":  # A and B move the norms, which the gradient leaves out by design
            continue
        assert torch.autograd.gradcheck(
            update, [leaf.requires_grad_() for leaf in leaves], fast_mode=True
        ), name


# By hand


def numbers(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def update_by_hand(kind, tensors, x, gates, base=None, weight=None):
    base = torch.zeros(1, kind.out_features, dtype=torch.float64) if base is None else base
    return kind.update(tensors, ExpertInput(x, base, lambda: weight), Gates(gates, 1.0))


def test_shared_a_by_hand():
    """A x = 1 + 2 = 3; B_1 = (1, 0), B_2 = (0, 2), gates 1/4 and 3/4."""
    kind = EXPERTS["shared_a"](plan_of(2, 2, 1), 2, 2)
    tensors = {"A": numbers((1, 1)), "B": numbers((1, 0), (0, 2))}
    found = update_by_hand(kind, tensors, numbers((1, 2)), numbers((0.25, 0.75)))
    assert found.tolist() == [[0.75, 4.5]]


def test_shared_b_by_hand():
    """a_1 x = 1, a_2 x = 2, mixed 1/4 + 3/2 = 7/4; b = (1, 2)."""
    kind = EXPERTS["shared_b"](plan_of(2, 2, 1), 2, 2)
    tensors = {"A": numbers((1, 0), (0, 1)), "B": numbers((1,), (2,))}
    found = update_by_hand(kind, tensors, numbers((1, 2)), numbers((0.25, 0.75)))
    assert found.tolist() == [[1.75, 3.5]]


def test_block_diagonal_by_hand():
    """Expert 1 sees (1, 2) and writes y_1, expert 2 sees (3, 4) and writes y_2."""
    kind = EXPERTS["block_diagonal"](plan_of(2, 2, 1), 4, 2)
    tensors = {"A": numbers((1, 1), (1, -1)), "B": numbers((2, 3))}
    found = update_by_hand(kind, tensors, numbers((1, 2, 3, 4)), numbers((1, 1)))
    assert found.tolist() == [[6, -3]]


def test_vector_by_hand():
    """d_1 = (1, 0), d_2 = (0, 2), gates 1/2 each, base (4, 10)."""
    kind = EXPERTS["vector"](plan_of(2, 2, 1), 2, 2)
    tensors = {"vector": numbers((1, 0), (0, 2))}
    found = update_by_hand(kind, tensors, numbers((0, 0)), numbers((0.5, 0.5)), numbers((4, 10)))
    assert found.tolist() == [[2, 10]]


def test_vector_is_the_paper_s_where_gates_sum_to_one():
    torch.manual_seed(0)
    kind = EXPERTS["vector"](plan_of(), D_IN, D_OUT)
    tensors, inputs, weights = drawn(kind), some_inputs(), some_gates()
    update = kind.update(tensors, inputs, Gates(weights, 1.0))
    paper = (weights @ (1 + tensors["vector"])) * inputs.base_output
    torch.testing.assert_close(inputs.base_output + update, paper, **CLOSE)
    # Otherwise the paper's has this much more of the base's output.
    update = kind.update(tensors, inputs, Gates(2 * weights, 1.0))
    paper = (2 * weights @ (1 + tensors["vector"])) * inputs.base_output
    torch.testing.assert_close(inputs.base_output + update, paper - inputs.base_output, **CLOSE)


def test_mixed_factors_by_hand():
    """a = (a_1 + a_2) / 2 = 3/2 and b = (b_1 + b_2) / 2 = 3: 4.5, where LoRA experts give 5."""
    tensors = {"A": numbers((1,), (2,)), "B": numbers((2, 4))}
    for name, expected in (("mixed_factors", 4.5), ("lora", 5.0)):
        kind = EXPERTS[name](plan_of(2, 2, 1), 1, 1)
        found = update_by_hand(kind, tensors, numbers((1,)), numbers((0.5, 0.5)))
        assert found.tolist() == [[expected]]


def test_dora_by_hand():
    """W = (3, 4) of norm 5; A = (1, 0) and B = 9 make it (12, 4) of norm sqrt(160); m = 5."""
    kind = EXPERTS["dora"](plan_of(1, 1, 1), 2, 1)
    tensors = {"A": numbers((1, 0)), "B": numbers((9,)), "magnitude": numbers((0,))}
    x, weight = numbers((1, 1)), numbers((3, 4))
    found = update_by_hand(kind, tensors, x, numbers((1,)), x @ weight.T, weight)
    assert float(found) == pytest.approx(5 / 160**0.5 * 16 - 7)


def test_tensor_product_by_hand():
    """(1, 2) x (3, 4) = (3, 4, 6, 8), cut to three entries; b = (5) x (1)."""
    kind = EXPERTS["tensor"](plan_of(1, 1, 1), 3, 1)
    tensors = {"leaves_A": numbers((1, 2), (3, 4)).unsqueeze(1), "leaves_B": numbers((5,), (1,))}
    tensors["leaves_B"] = tensors["leaves_B"].unsqueeze(1)
    found = update_by_hand(kind, tensors, numbers((1, 10, 100)), numbers((1,)))
    assert found.tolist() == [[5 * (3 + 40 + 600)]]


def test_pools_by_hand():
    """Gates order a's 1, 2; scores (6, 1, 3) / 10 order b's 0, 2, of shares 2/3 and 1/3."""
    kind = EXPERTS["pools"](plan_of(3, 2, 1), 1, 3)
    scores = numbers((0.6,), (0.1,), (0.3,)).log()
    tensors = {"A": numbers((100,), (1,), (2,)), "B": torch.eye(3).double(), "gate_B": scores}
    found = update_by_hand(kind, tensors, numbers((1,)), numbers((0, 0.75, 0.25)))
    expected = numbers((0.75 * 1 * 2 / 3, 0, 0.25 * 2 * 1 / 3))
    torch.testing.assert_close(found, expected)


def test_tree_by_hand():
    """One path: leaf 2 x, top 3 x + W leaf; widths D_1 = 1, D_2 = 2, with f the identity."""
    kind = EXPERTS["tree"](
        plan_of(1, 1, 1), 1, 1, children=1, fan_out=1, activation="identity", gate_width=1
    )
    tensors = {name: torch.ones(s, dtype=torch.float64) for name, s in kind.shapes().items()}
    tensors["A0"] *= 2
    tensors["B1"] = numbers((3,), (0,))
    tensors["W1"] = numbers((0,), (5,))
    found = update_by_hand(kind, tensors, numbers((1,)), numbers((0.5,)))
    assert found.tolist() == [[0.5 * (3 + 5 * 2)]]


def test_a_frozen_sparse_a_is_what_the_paper_draws():
    torch.manual_seed(0)
    plan = plan_of(8, 3, 1)
    kind = EXPERTS["frozen_sparse_a"](plan, 64, 4)
    a = torch.empty(8, 64)
    kind.reset({"A": a})
    assert kind.frozen == {"A"}
    assert ((a != 0).sum(1) == 24).all()  # floor(64 * 3 / 8)
    assert len({tuple(row.nonzero().flatten().tolist()) for row in a}) == 8
    # 192 draws: their standard deviation is that of N(0, 1/8^2) within five of its own deviations.
    assert float(a[a != 0].std()) == pytest.approx(1 / 8, rel=5 / (2 * 192) ** 0.5)
    assert EXPERTS["frozen_sparse_a"](plan, 64, 4, density=0.001).shapes()["A"] == (8, 64)
    EXPERTS["frozen_sparse_a"](plan, 64, 4, density=0.001).reset({"A": a})
    assert ((a != 0).sum(1) == 1).all()


def test_tensor_leaves_give_lora_s_variance():
    torch.manual_seed(0)
    kind = EXPERTS["tensor"](plan_of(50, 1, 4), 60, 60, order=3)
    tensors = {name: torch.empty(shape) for name, shape in kind.shapes().items()}
    kind.reset(tensors)
    a = kind._factors(tensors)["A"]
    # 200 rows of products of 4-vectors: the mean square varies by some ten percent.
    assert float(a.square().mean()) == pytest.approx(1 / (3 * 60), rel=0.3)
    # Powers that floating point only nearly reaches do not cost a further entry.
    assert EXPERTS["tensor"](plan_of(), 1000, 216, order=3).shapes() == {
        "leaves_A": (3, 8, 10),
        "leaves_B": (3, 8, 6),
    }


# PEFT's own


def with_tensors(net, **tensors):
    for layer in moelora_layers(net).values():
        for name, tensor in layer.tensors().items():
            tensor.data.copy_(tensors[name])


@pytest.mark.parametrize("n_splits", [1, 2])
def test_mixed_factors_are_peft_s_poly(n_splits):
    """The same weights, tasks and skills: value and the gradient of every weight and of x."""
    torch.manual_seed(0)
    rank, skills, tasks = 3, 4, 5
    base = nn.Sequential(nn.Linear(12, 8)).double()
    config = PolyConfig(
        target_modules=["0"], r=rank, n_tasks=tasks, n_skills=skills, n_splits=n_splits,
        init_weights=False,
    )  # fmt: skip
    layer = get_peft_model(base, config).base_model.model[0].double().eval()
    nn.init.normal_(layer.poly_router["default"].module_logits)
    a, b = layer.poly_lora_A["default"], layer.poly_lora_B["default"]
    task_ids, x = torch.tensor([3, 0]), torch.randn(2, 6, 12, dtype=torch.float64)
    x.requires_grad_()
    theirs = layer(x, task_ids=task_ids)
    upstream = torch.randn_like(theirs)
    expected = torch.autograd.grad(theirs, [a, b, x], upstream)

    experts = n_splits * skills
    plan = LayerPlan(experts, experts, (rank,) * experts, alpha=1.0)
    kind = EXPERTS["mixed_factors"](plan, 12, 8, n_splits=n_splits)
    # (splits, skills, in, r) -> (splits * skills * r, in), and (.., r, out) -> (out, ..).
    tensors = {"A": a.transpose(-1, -2).flatten(0, 2), "B": b.flatten(0, 2).T}
    logits = layer.poly_router["default"].module_logits[task_ids]
    gates = torch.sigmoid(logits)
    gates = (gates / gates.sum(-1, keepdim=True)).repeat_interleave(6, 0)
    base_output = layer.base_layer(x)
    inputs = ExpertInput(x.flatten(0, 1), base_output.flatten(0, 1), lambda: base[0].weight)
    update = kind.update(tensors, inputs, Gates(gates, plan.scaling()))
    ours = base_output + update.view_as(base_output)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    for got, want in zip(torch.autograd.grad(ours, [a, b, x], upstream), expected, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_one_expert_with_a_magnitude_is_peft_s_dora():
    torch.manual_seed(0)
    x = torch.randn(5, 12, dtype=torch.float64)
    base = nn.Linear(12, 8, bias=False).double()
    theirs = get_peft_model(
        nn.Sequential(nn.Linear(12, 8, bias=False)).double(),
        LoraConfig(r=2, lora_alpha=6, target_modules=["0"], use_dora=True),
        autocast_adapter_dtype=False,
    )
    layer = theirs.base_model.model[0]
    layer.base_layer.weight.data.copy_(base.weight)
    nn.init.normal_(layer.lora_B["default"].weight)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    nn.init.uniform_(magnitude, 1, 2)
    expected = theirs(x)
    upstream = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, [a, b, magnitude], upstream)

    config = MoeLoraConfig(
        r=2, num_experts=1, top_k=1, lora_alpha=6, lora_dropout=0, target_modules=["0"],
        expert="dora",
    )  # fmt: skip
    ours = get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)
    stored = magnitude - base.weight.norm(dim=1)
    with_tensors(ours, A=a, B=b, magnitude=stored.detach().unsqueeze(0))
    found = ours(x)
    torch.testing.assert_close(found, expected, **CLOSE)
    tensors = next(iter(moelora_layers(ours).values())).tensors()
    leaves = [tensors[name] for name in ("A", "B", "magnitude")]
    for got, want in zip(torch.autograd.grad(found, leaves, upstream), expected_grads, strict=True):
        torch.testing.assert_close(got.view_as(want), want, **CLOSE)


# Options


@pytest.mark.parametrize(
    ("name", "plan", "options", "message"),
    [
        ("shared_a", plan_of(ranks=(1, 2)), {}, r"one rank.*\[1, 2\].*allocation"),
        ("shared_a", plan_of(), {"a_dropout": 1.0}, r"a_dropout"),
        ("shared_b", plan_of(ranks=(1, 2)), {}, r"one rank"),
        ("rank", plan_of(rank=2), {}, r"set r to 1, or r to num_experts with total_rank"),
        ("rank", plan_of(rank=1), {"metric": "both"}, r"metric.*expert, joint"),
        ("frozen_sparse_a", plan_of(), {"density": 0.0}, r"density"),
        ("block_diagonal", plan_of(5), {}, r"num_experts=5 does not divide the width 12"),
        ("block_diagonal", plan_of(6), {}, r"num_experts=6 does not divide the width 8"),
        ("mixed_factors", plan_of(), {"n_splits": 3}, r"n_splits.*num_experts 4"),
        ("mixed_factors", plan_of(6), {"n_splits": 3}, r"n_splits.*width 8"),
        ("mixed_factors", plan_of(), {"n_splits": 0}, r"n_splits"),
        ("tensor", plan_of(), {"order": 1}, r"order"),
        ("pools", plan_of(rank=2), {}, r"set r to 1"),
        ("pools", plan_of(rank=1), {"selection": "both"}, r"selection.*independent, conditional"),
        ("tree", plan_of(), {"children": [2, 3]}, r"children.*fan_out"),
        ("tree", plan_of(), {"children": 2, "fan_out": 3}, r"fan_out.*children"),
        ("tree", plan_of(), {"activation": "gelu"}, r"activation.*tanh, relu, identity"),
        ("tree", plan_of(), {"gate_width": 0}, r"gate_width"),
    ],
)
def test_what_does_not_fit_is_refused(name, plan, options, message):
    with pytest.raises(ConfigError, match=message):
        EXPERTS[name](plan, D_IN, D_OUT, **options)


def test_pools_select_as_many_b_as_the_router_selects_a():
    """A router that selects a varying number, none at all included."""
    torch.manual_seed(0)
    kind = EXPERTS["pools"](plan_of(rank=1), D_IN, D_OUT)
    tensors = {**drawn(kind), "B": torch.randn(D_OUT, 4, dtype=torch.float64)}
    weights = numbers((0, 0, 0, 0), (0, 1, 0, 0), (0.2, 0.3, 0.1, 0.4))
    inputs = some_inputs(3)
    update = kind.update(tensors, inputs, Gates(weights, 1.0))
    assert torch.count_nonzero(update[0]) == 0
    best = torch.softmax(inputs.x[1] @ tensors["gate_B"].T, 0).argmax()
    expected = (inputs.x[1] @ tensors["A"][1]) * tensors["B"][:, best]
    torch.testing.assert_close(update[1], expected)


def test_dropout_on_a_is_for_training_only():
    torch.manual_seed(0)
    kind = EXPERTS["shared_a"](plan_of(), D_IN, D_OUT, a_dropout=0.5)
    plain = EXPERTS["shared_a"](plan_of(), D_IN, D_OUT)
    tensors, inputs, gates = drawn(kind), some_inputs(), Gates(some_gates(), S)
    trained = dataclasses.replace(inputs, training=True)
    assert torch.equal(kind.update(tensors, inputs, gates), plain.update(tensors, inputs, gates))
    torch.manual_seed(1)
    dropped = kind.update(tensors, trained, gates)
    torch.manual_seed(1)
    masked = {**tensors, "A": torch.nn.functional.dropout(tensors["A"], 0.5)}
    assert torch.equal(dropped, plain.update(masked, inputs, gates))
