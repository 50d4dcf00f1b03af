"""The grouped mixture against the slow oracle and the dense one, in value and every gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from route_rows import make_router, route_rows

from moelora_plugin.ops.grouped import grouped_experts
from moelora_plugin.ops.rank_gated import rank_gated
from moelora_plugin.ops.reference import moe_lora_loop, topk_softmax_loop
from moelora_plugin.types import Gates

SHAPES = [  # tokens, in, out, experts, rank, top_k
    (1, 3, 5, 1, 1, 1),
    (7, 12, 10, 3, 2, 2),
    (16, 20, 9, 5, 4, 5),
    (9, 8, 8, 16, 1, 1),
    (40, 16, 24, 32, 3, 4),
]
MODES = list(itertools.product(["none", "sqrt", "exact"], ["weights", "output"]))
# Sums run in another order than in the loop and in the dense path; inputs are of order one, so 64
# machine epsilons of the result's magnitude (at most a few tens here) cover it with a wide margin.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-4}
NAMES = ("x", "a", "b", "gates", "onto")


def inputs(shape, dtype=torch.float64, seed=0):
    """x, A, B, gates and what is added to, as leaves; and the gradient of the result."""
    tokens, d_in, d_out, experts, rank, top_k = shape
    torch.manual_seed(seed)
    leaves = [
        torch.randn(tokens, d_in, dtype=dtype),
        torch.randn(experts * rank, d_in, dtype=dtype),
        torch.randn(d_out, experts * rank, dtype=dtype),
        topk_softmax_loop(torch.randn(tokens, experts, dtype=dtype), top_k),
        torch.randn(tokens, d_out, dtype=dtype),
    ]
    upstream = torch.randn(tokens, d_out, dtype=dtype)
    return [leaf.detach().requires_grad_() for leaf in leaves], upstream


def with_weights(leaves, weights):
    """The same with other gates."""
    return [*leaves[:3], weights.detach().requires_grad_(), *leaves[4:]]


def grouped(leaves, scaling=1.7, rescale="none", scope="weights"):
    x, a, b, weights, onto = leaves
    return grouped_experts(x, a, b, Gates(weights, scaling, rescale, scope), onto)


def dense(leaves, scaling=1.7, rescale="none", scope="weights"):
    x, a, b, weights, onto = leaves
    return onto + rank_gated(x, a, b, Gates(weights, scaling, rescale, scope))


def oracle(leaves, scaling=1.7, rescale="none", scope="weights"):
    x, a, b, weights, onto = leaves
    experts = weights.shape[1]
    ranks = (len(a) // experts,) * experts
    return onto + moe_lora_loop(x, a, b, weights, ranks, scaling, rescale, scope)


def assert_equal(leaves, upstream, mode=("none", "weights"), slow_paths=(oracle, dense)):
    """Value and gradients; a closed gate's is what the grouped path leaves out."""
    dtype = leaves[0].dtype
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    fast = grouped(leaves, 1.7, *mode)
    fast_grads = torch.autograd.grad(fast, leaves, upstream)
    weights = leaves[3]
    assert not fast_grads[3][weights == 0].any()
    for path in slow_paths:
        slow = path(leaves, 1.7, *mode)
        torch.testing.assert_close(fast, slow, **tolerance)
        slow_grads = list(torch.autograd.grad(slow, leaves, upstream))
        slow_grads[3] = slow_grads[3] * (weights != 0)
        for name, got, expected in zip(NAMES, fast_grads, slow_grads, strict=True):
            torch.testing.assert_close(
                got, expected, **tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("rescale", "scope"), MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_oracle_and_the_dense_path(shape, rescale, scope, dtype):
    leaves, upstream = inputs(shape, dtype)
    assert_equal(leaves, upstream, (rescale, scope))


def uneven(kind, tokens, experts):
    """Gates (T, E) that no top-k router would give."""
    torch.manual_seed(1)
    weights = torch.rand(tokens, experts, dtype=torch.float64)
    if kind == "tokens without an expert":
        weights[1::2] = 0
        weights[0, 2:] = 0
    elif kind == "experts without a token":
        weights[:, ::2] = 0
    elif kind == "one expert has all":
        weights[:, :3] = 0
        weights[:, 4:] = 0
    elif kind == "none at all":
        weights[:] = 0
    elif kind == "another number for each token":
        weights *= torch.rand_like(weights) < torch.linspace(0, 1, tokens)[:, None]
    return weights


@pytest.mark.parametrize(
    "kind",
    [
        "tokens without an expert",
        "experts without a token",
        "one expert has all",
        "none at all",
        "another number for each token",
        "all selected",
    ],
)
@pytest.mark.parametrize(("rescale", "scope"), MODES)
def test_uneven_gates_equal_the_oracle(kind, rescale, scope):
    leaves, upstream = inputs((12, 10, 7, 6, 2, 2))
    assert_equal(with_weights(leaves, uneven(kind, 12, 6)), upstream, (rescale, scope))


def test_no_tokens_give_an_empty_update_and_zero_gradients():
    leaves, _ = inputs((2, 5, 6, 3, 2, 1))
    leaves = [leaves[0][:0], *leaves[1:3], leaves[3][:0], leaves[4][:0]]
    out = grouped(leaves, 1.0, "sqrt")
    assert out.shape == (0, 6)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert not any(grad.any() for grad in grads)


def test_an_expert_without_tokens_gets_a_gradient_of_zeros():
    leaves, upstream = inputs((12, 10, 7, 6, 2, 2))
    leaves = with_weights(leaves, uneven("experts without a token", 12, 6))
    # Memory that was in use before holds what was there; a fresh one is zero anyway.
    poison = [torch.full((64, 64), float("nan")) for _ in range(64)]
    del poison
    grad_a, grad_b = torch.autograd.grad(grouped(leaves), leaves[1:3], upstream)
    per_expert = zip(grad_a.split(2), grad_b.split(2, 1), strict=True)
    for expert, (of_a, of_b) in enumerate(per_expert):
        assert of_a.any() == of_b.any() == (expert % 2 == 1)


def test_gradcheck_of_the_ordinary_gradient():
    leaves, _ = inputs((4, 5, 6, 3, 2, 2))
    mask = leaves[3].detach() != 0  # beyond a mask nothing passes
    assert torch.autograd.gradcheck(
        lambda x, a, b, weights, onto: grouped((x, a, b, weights * mask, onto)), leaves
    )


def test_the_value_is_the_same_in_every_mode():
    leaves, _ = inputs(SHAPES[4])
    values = [grouped(leaves, 2.0, *mode) for mode in MODES]
    assert all(torch.equal(values[0], value) for value in values[1:])


def test_without_anything_to_add_to_it_is_the_update():
    leaves, upstream = inputs(SHAPES[4])
    x, a, b, weights, _ = leaves
    gates = Gates(weights, 1.7, "sqrt")
    fast, slow = grouped_experts(x, a, b, gates), rank_gated(x, a, b, gates)
    tolerance = {"rtol": TOLERANCE[torch.float64], "atol": TOLERANCE[torch.float64]}
    torch.testing.assert_close(fast, slow, **tolerance)
    fast_grads = torch.autograd.grad(fast, leaves[:3], upstream)
    slow_grads = torch.autograd.grad(slow, leaves[:3], upstream)
    for got, expected in zip(fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(got, expected, **tolerance)


def test_what_is_added_to_stays_as_it_is():
    leaves, upstream = inputs(SHAPES[1])
    before = [leaf.detach().clone() for leaf in leaves]
    torch.autograd.grad(grouped(leaves), leaves, upstream)
    assert all(map(torch.equal, leaves, before))


@pytest.mark.parametrize("frozen", NAMES)
def test_what_needs_no_gradient_gets_none_and_changes_no_other(frozen):
    leaves, upstream = inputs(SHAPES[1])
    expected = dict(
        zip(NAMES, torch.autograd.grad(grouped(leaves, 1.7, "sqrt"), leaves, upstream), strict=True)
    )
    some = [
        leaf.detach() if name == frozen else leaf for name, leaf in zip(NAMES, leaves, strict=True)
    ]
    grouped(some, 1.7, "sqrt").backward(upstream)
    for name, leaf in zip(NAMES, leaves, strict=True):
        if name == frozen:
            assert leaf.grad is None
        else:
            assert torch.equal(leaf.grad, expected[name])


def test_a_gradient_of_the_sum_which_is_no_real_tensor():
    leaves, _ = inputs(SHAPES[1])
    ones = torch.ones(SHAPES[1][0], SHAPES[1][2], dtype=torch.float64)
    expected = torch.autograd.grad(grouped(leaves), leaves, ones)
    assert all(map(torch.equal, torch.autograd.grad(grouped(leaves).sum(), leaves), expected))


def test_a_gate_that_is_nan_shows_in_its_own_token_only():
    leaves, _ = inputs(SHAPES[1])
    weights = leaves[3].detach().clone()
    weights[2, 1] = float("nan")
    broken = grouped(with_weights(leaves, weights)).isnan()
    assert broken[2].all()
    assert not broken[[0, 1, 3, 4, 5, 6]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rescale", "scope"), MODES)
def test_half_precision_follows_the_oracle(dtype, rescale, scope):
    leaves, upstream = inputs((40, 20, 9, 16, 4, 8), torch.float32)
    # What both start from, so that only what happens in between is compared.
    leaves = [leaf.detach().to(dtype).float().requires_grad_() for leaf in leaves]
    upstream = upstream.to(dtype).float()
    slow = oracle(leaves, 1.7, rescale, scope)
    slow_grads = list(torch.autograd.grad(slow, leaves, upstream))
    slow_grads[3] = slow_grads[3] * (leaves[3] != 0)
    half = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    half[3] = leaves[3]  # gates stay fp32, as routers give them
    fast = grouped(half, 1.7, rescale, scope)
    assert fast.dtype == dtype
    grads = torch.autograd.grad(fast, half, upstream.to(dtype))
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in half]
    # z, h, each expert's output and the result are each rounded once, the sum over experts is not:
    # a handful of epsilons of the largest entry.
    for name, got, expected in zip(("y", *NAMES), (fast, *grads), (slow, *slow_grads), strict=True):
        error = (got.float() - expected).abs().max()
        assert error < 4 * torch.finfo(dtype).eps * expected.abs().max(), name


def test_half_precision_onto_a_wider_sum_keeps_the_wider_dtype():
    leaves, upstream = inputs((16, 20, 9, 5, 4, 2), torch.float32)
    half = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves[:3]]
    out = grouped([*half, *leaves[3:]])
    assert out.dtype == torch.float32
    assert torch.equal(torch.autograd.grad(out, leaves[4], upstream)[0], upstream)
    narrow = grouped([*leaves[:4], leaves[4].bfloat16()])
    assert narrow.dtype == torch.float32
    # The update is not rounded to what it is added to.
    torch.testing.assert_close(narrow, oracle([*leaves[:4], leaves[4].bfloat16().float()]))


def test_the_sum_over_experts_is_rounded_once():
    leaves, _ = inputs((4, 8, 6, 64, 1, 64), torch.float32)
    half = [leaf.detach().abs().bfloat16() for leaf in leaves]
    half[4] = half[4] + 256  # to which a bf16 sum adds nothing, expert after expert
    expected = oracle([leaf.float() for leaf in half])
    error = (grouped(half).float() - expected).abs().max()
    assert error <= torch.finfo(torch.bfloat16).eps * expected.abs().max()


def test_autocast_computes_in_its_dtype_and_keeps_parameter_gradients_wide():
    leaves, _ = inputs((16, 20, 9, 5, 4, 2), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = grouped_experts(*leaves[:3], Gates(leaves[3], 1.7, "sqrt"))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves[:4])
    expected = oracle([leaf.detach() for leaf in leaves]) - leaves[4].detach()
    error = (out.detach().float() - expected).abs().max()
    # x, A and B, z, h and the result are each rounded once.
    assert error < 8 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


def test_checkpointing_gives_the_same_gradients():
    leaves, upstream = inputs(SHAPES[4])
    again = torch.utils.checkpoint.checkpoint(
        lambda *tensors: grouped(tensors, 1.7, "sqrt"), *leaves, use_reentrant=False
    )
    expected = torch.autograd.grad(grouped(leaves, 1.7, "sqrt"), leaves, upstream)
    assert all(map(torch.equal, torch.autograd.grad(again, leaves, upstream), expected))


# Where a graph breaks, dynamo asks every tensor for .grad.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_runs_in_a_compiled_function():
    torch.compiler.reset()
    compiled = torch.compile(lambda *tensors: grouped(tensors, 1.7, "sqrt"), backend="eager")
    for tokens in (12, 7):  # and so another number of pairs
        leaves, upstream = inputs((tokens, 10, 7, 6, 2, 2))
        found, expected = compiled(*leaves), grouped(leaves, 1.7, "sqrt")
        assert torch.equal(found, expected)
        found_grads = torch.autograd.grad(found, leaves, upstream)
        assert all(map(torch.equal, found_grads, torch.autograd.grad(expected, leaves, upstream)))


ROUTERS = [
    ("topk", {}),
    ("topk", {"renormalize": False}),
    ("noisy_topk", {}),
    ("sinkhorn", {}),
    ("top_p", {"p": 0.5, "renormalize": True}),
    ("threshold", {}),
    ("sparsegen", {}),
    ("relu", {}),
    ("expert_choice", {}),
    ("sigmoid", {"max_threshold": 0.5}),
    ("softmax", {}),
]


@pytest.mark.parametrize(("name", "options"), ROUTERS, ids=str)
def test_a_router_that_masks_learns_the_same_from_both_paths(name, options):
    leaves, upstream = inputs((24, 6, 5, 8, 2, 2))
    router = make_router(name, 8, 2, 6, **options).train()
    score = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    learned = [score, *(p for p in router.parameters() if p.requires_grad)]
    grads = []
    for path in (grouped, dense):
        torch.manual_seed(3)
        weights = route_rows(router, leaves[0], score).weights
        out = path([*leaves[:3], weights, leaves[4]])
        grads.append(torch.autograd.grad(out, learned, upstream))
    assert (weights == 0).any() == (name != "softmax")
    for got, expected in zip(*grads, strict=True):
        assert expected.any()
        # Sums in another order, in float64.
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


STRAIGHT_THROUGH = [("hard", 1, {}), ("sigmoid", 2, {"max_threshold": 0.5})]


@pytest.mark.parametrize(("name", "top_k", "options"), STRAIGHT_THROUGH, ids=str)
def test_a_straight_through_router_needs_the_dense_path(name, top_k, options):
    leaves, upstream = inputs((24, 6, 5, 8, 2, 2))
    router = make_router(name, 8, top_k, 6, straight_through=True, **options)
    learned = list(router.parameters())
    score = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    weights = route_rows(router, leaves[0], score).weights
    grads = [
        torch.autograd.grad(
            path([*leaves[:3], weights, leaves[4]]),
            learned or [score],
            upstream,
            retain_graph=True,
        )[0]
        for path in (grouped, dense)
    ]
    assert not torch.allclose(*grads)
