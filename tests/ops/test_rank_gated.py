"""The fused mixture against the slow oracle, in value and every gradient."""

from __future__ import annotations

import itertools

import pytest
import torch

from moelora_plugin.ops.rank_gated import rank_gated
from moelora_plugin.ops.reference import (
    moe_lora_loop,
    shared_a_terms,
    shared_b_terms,
    sum_of_terms,
    topk_softmax_loop,
)
from moelora_plugin.types import Gates

SHAPES = [  # tokens, in, out, ranks
    (1, 3, 5, (1,)),
    (7, 12, 10, (2, 2, 2)),
    (16, 20, 9, (4,) * 5),
    (5, 8, 8, (1, 3, 2)),
    (9, 16, 24, (4, 1, 1, 6)),
]
MODES = list(itertools.product(["none", "sqrt", "exact"], ["weights", "output"]))
# Sums run in another order than in the loop; inputs are of order one, so 64 machine epsilons of the
# result's magnitude (at most a few tens here) cover it with a wide margin for every shape above.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-4}


def inputs(shape, top_k, dtype, seed=0):
    tokens, d_in, d_out, ranks = shape
    torch.manual_seed(seed)
    weights = topk_softmax_loop(torch.randn(tokens, len(ranks), dtype=dtype), top_k)
    leaves = [
        torch.randn(tokens, d_in, dtype=dtype),
        torch.randn(sum(ranks), d_in, dtype=dtype),
        torch.randn(d_out, sum(ranks), dtype=dtype),
        weights,
    ]
    return [leaf.detach().requires_grad_() for leaf in leaves], torch.randn(
        tokens, d_out, dtype=dtype
    )


def fused(leaves, ranks, scaling, rescale, scope):
    owners = torch.tensor([e for e, rank in enumerate(ranks) for _ in range(rank)])
    *tensors, weights = leaves
    gates = Gates(weights, scaling, rescale, scope)
    return rank_gated(*tensors, gates, None if len(set(ranks)) == 1 else owners)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("rescale", "scope"), MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_oracle(shape, rescale, scope, dtype):
    ranks = shape[3]
    for top_k in sorted({1, (len(ranks) + 1) // 2, len(ranks)}):
        leaves, upstream = inputs(shape, top_k, dtype)
        fast = fused(leaves, ranks, 1.7, rescale, scope)
        fast_grads = torch.autograd.grad(fast, leaves, upstream)
        slow = moe_lora_loop(*leaves, ranks, 1.7, rescale, scope)
        slow_grads = torch.autograd.grad(slow, leaves, upstream)
        tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
        torch.testing.assert_close(fast, slow, **tolerance)
        for name, got, expected in zip(
            ["x", "a", "b", "gates"], fast_grads, slow_grads, strict=True
        ):
            torch.testing.assert_close(
                got, expected, **tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3, 2)])
def test_gradcheck_of_the_ordinary_gradient(ranks):
    leaves, _ = inputs((4, 5, 6, ranks), 2, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: fused(t, ranks, 1.3, "none", "weights"), leaves)


def test_the_value_is_the_same_in_every_mode():
    leaves, _ = inputs(SHAPES[2], 2, torch.float64)
    values = [fused(leaves, SHAPES[2][3], 2.0, *mode) for mode in MODES]
    assert all(torch.equal(values[0], value) for value in values[1:])


def test_weights_scope_gives_x_the_true_gradient():
    leaves, upstream = inputs(SHAPES[2], 2, torch.float64)
    ranks = SHAPES[2][3]
    (true,) = torch.autograd.grad(
        fused(leaves, ranks, 2.0, "none", "weights"), leaves[:1], upstream
    )
    for rescale in ("sqrt", "exact"):
        (x_grad,) = torch.autograd.grad(
            fused(leaves, ranks, 2.0, rescale, "weights"), leaves[:1], upstream
        )
        assert torch.equal(x_grad, true)
        (surrogate,) = torch.autograd.grad(
            fused(leaves, ranks, 2.0, rescale, "output"), leaves[:1], upstream
        )
        assert not torch.allclose(surrogate, true)


def test_sqrt_rescale_divides_one_expert_s_gradient_by_the_root_of_its_gate():
    torch.manual_seed(0)
    x, a, b = (torch.randn(*s, dtype=torch.float64) for s in [(6, 5), (2, 5), (4, 2)])
    gate = torch.full((6, 1), 0.25, dtype=torch.float64)
    a.requires_grad_()
    grads = {
        mode: torch.autograd.grad(rank_gated(x, a, b, Gates(gate, 1.0, mode)).sum(), a)[0]
        for mode in ("none", "sqrt", "exact")
    }
    torch.testing.assert_close(grads["sqrt"], grads["none"] / 0.5)
    torch.testing.assert_close(grads["exact"], grads["none"] / 0.25)


def test_experts_that_no_token_selects_get_a_zero_gradient():
    leaves, upstream = inputs((6, 5, 4, (2, 2)), 1, torch.float64)
    weights = torch.zeros(6, 2, dtype=torch.float64)
    weights[:, 0] = 1.0
    for mode in ("none", "sqrt", "exact"):
        out = rank_gated(*leaves[:3], Gates(weights, 1.0, mode))
        grad_a, grad_b = torch.autograd.grad(out, leaves[1:3], upstream)
        assert torch.count_nonzero(grad_a[2:]) == 0
        assert torch.count_nonzero(grad_b[:, 2:]) == 0
        assert torch.count_nonzero(grad_a[:2]) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rescale", ["none", "sqrt", "exact"])
def test_half_precision_follows_the_oracle(dtype, rescale):
    shape = (16, 20, 9, (4,) * 5)
    leaves, upstream = inputs(shape, 2, torch.float32)
    slow = moe_lora_loop(*leaves, shape[3], 1.7, rescale)
    slow_grads = torch.autograd.grad(slow, leaves, upstream)
    half = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves[:3]]
    gates = leaves[3].detach().requires_grad_()  # gates stay fp32, as routers give them
    fast = rank_gated(*half, Gates(gates, 1.7, rescale))
    assert fast.dtype == dtype
    grads = torch.autograd.grad(fast, [*half, gates], upstream.to(dtype))
    # Inputs, z, h and the result are each rounded once: a handful of epsilons of the largest entry.
    for got, expected in zip([fast, *grads], [slow, *slow_grads], strict=True):
        assert (got.float() - expected).abs().max() < 8 * torch.finfo(
            dtype
        ).eps * expected.abs().max()


def test_autocast_computes_in_its_dtype_and_keeps_parameter_gradients_wide():
    leaves, _ = inputs((16, 20, 9, (4,) * 5), 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = rank_gated(*leaves[:3], Gates(leaves[3], 1.7, "sqrt"))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)
    expected = moe_lora_loop(*[leaf.detach() for leaf in leaves], (4,) * 5, 1.7)
    error = (out.detach().float() - expected).abs().max()
    assert error < 8 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


# A shared factor


TERMS = {"a": shared_a_terms, "b": shared_b_terms}


def shared_inputs(shared, shape, dtype=torch.float64):
    tokens, d_in, d_out, experts, rank = shape
    torch.manual_seed(0)
    leaves = [
        torch.randn(tokens, d_in, dtype=dtype),
        torch.randn(rank if shared == "a" else experts * rank, d_in, dtype=dtype),
        torch.randn(d_out, rank if shared == "b" else experts * rank, dtype=dtype),
        topk_softmax_loop(torch.randn(tokens, experts, dtype=dtype), (experts + 1) // 2),
    ]
    return [leaf.requires_grad_() for leaf in leaves], torch.randn(tokens, d_out, dtype=dtype)


def shared_oracle(leaves, shared, rank, scaling, rescale, scope):
    x, a, b, weights = leaves
    terms = TERMS[shared](weights, rank, scaling)
    return sum_of_terms(terms, x, x.new_zeros(len(x), len(b)), {"A": a, "B": b}, rescale, scope)


SHARED_SHAPES = [(1, 3, 5, 1, 1), (7, 12, 10, 3, 2), (16, 20, 9, 5, 4), (5, 8, 8, 4, 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("rescale", "scope"), MODES)
@pytest.mark.parametrize("shape", SHARED_SHAPES, ids=str)
@pytest.mark.parametrize("shared", ["a", "b"])
def test_a_shared_factor_equals_the_oracle(shared, shape, rescale, scope, dtype):
    leaves, upstream = shared_inputs(shared, shape, dtype)
    fast = rank_gated(*leaves[:3], Gates(leaves[3], 1.7, rescale, scope), shared=shared)
    slow = shared_oracle(leaves, shared, shape[4], 1.7, rescale, scope)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(fast, slow, **tolerance)
    fast_grads = torch.autograd.grad(fast, leaves, upstream)
    slow_grads = torch.autograd.grad(slow, leaves, upstream)
    for name, got, expected in zip(["x", "a", "b", "gates"], fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(got, expected, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("shared", ["a", "b"])
def test_gradcheck_of_a_shared_factor(shared):
    leaves, _ = shared_inputs(shared, (4, 5, 6, 3, 2))

    def update(x, a, b, weights):
        return rank_gated(x, a, b, Gates(weights, 1.3), shared=shared)

    assert torch.autograd.gradcheck(update, leaves)


@pytest.mark.parametrize("shared", ["a", "b"])
def test_a_shared_factor_in_bf16_and_under_autocast(shared):
    shape = (16, 20, 9, 5, 4)
    leaves, upstream = shared_inputs(shared, shape, torch.float32)
    slow = shared_oracle(leaves, shared, 4, 1.7, "sqrt", "weights")
    slow_grads = torch.autograd.grad(slow, leaves, upstream)
    half = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves[:3]]
    gates = Gates(leaves[3], 1.7, "sqrt")
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = rank_gated(*leaves[:3], gates, shared=shared)
    in_half = rank_gated(*half, gates, shared=shared)
    for fast, factors in ((in_half, half), (under_autocast, leaves[:3])):
        assert fast.dtype == torch.bfloat16
        grads = torch.autograd.grad(fast, [*factors, leaves[3]], upstream.bfloat16())
        # Inputs, z, h, the sum over experts and the result are each rounded once.
        for got, expected in zip([fast, *grads], [slow, *slow_grads], strict=True):
            error = (got.float() - expected).abs().max()
            assert error < 10 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


@pytest.mark.parametrize("shared", ["none", "a", "b"])
def test_no_tokens_give_an_empty_update_and_zero_gradients(shared):
    leaves, _ = shared_inputs(shared, (2, 5, 6, 3, 2))
    x, weights = leaves[0][:0], leaves[3][:0]
    if shared == "none":
        leaves[1] = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
        leaves[2] = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    out = rank_gated(x, *leaves[1:3], Gates(weights, 1.0, "sqrt"), shared=shared)
    assert out.shape == (0, 6)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.count_nonzero(grad) == 0 for grad in grads)
