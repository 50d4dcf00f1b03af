"""The fused mixture against the slow oracle, in value and every gradient."""

from __future__ import annotations

import itertools

import pytest
import torch

from moelora_plugin.ops.rank_gated import rank_gated
from moelora_plugin.ops.reference import moe_lora_loop, topk_softmax_loop
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
