"""The batched preconditioner: against the slow loop, by hand, and where metrics are singular."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from moelora_plugin.ops import precondition as module
from moelora_plugin.ops.precondition import (
    damped_inverses,
    gram,
    join_experts,
    metric_of,
    split_experts,
)
from moelora_plugin.ops.reference import precondition_loop

LAYERS = [  # in, out, ranks
    (6, 5, (2, 2, 2)),
    (9, 4, (1, 3, 2)),
    (6, 5, (2, 2)),
    (5, 7, (4,)),
    (8, 8, (1, 1, 1, 1)),
    (3, 2, (4, 4)),  # ranks above the features: singular without damping
]


def precondition(a, b, grad_a, grad_b, ranks, damping):
    metrics = [gram(split_experts(b, ranks, 1)), gram(split_experts(a, ranks, 0))]
    (for_a, for_b), escalated = damped_inverses(metrics, damping)
    assert escalated == 0
    return (
        join_experts(for_a @ split_experts(grad_a, ranks, 0), ranks, 0),
        join_experts(for_b @ split_experts(grad_b, ranks, 1), ranks, 1),
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-3)])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_equals_the_loop(layer, dtype, tolerance):
    d_in, d_out, ranks = layer
    torch.manual_seed(0)
    total = sum(ranks)
    a, b, grad_a, grad_b = (
        torch.randn(*shape, dtype=dtype)
        for shape in [(total, d_in), (d_out, total), (total, d_in), (d_out, total)]
    )
    found = precondition(a, b, grad_a, grad_b, ranks, 1e-2)
    expected = precondition_loop(a, b, grad_a, grad_b, ranks, 1e-2)
    for got, want in zip(found, expected, strict=True):
        # Cholesky against LU: epsilon times the condition number, at most 30 / 1e-2 here.
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", ["as stored", "transposed"])
@pytest.mark.parametrize(
    "ranks", [(4,) * 20, (4,) * 7, (16, 16), (3,) * 6, (20,), (1, 5, 2), (2, 6) * 10], ids=str
)
def test_metrics_and_products_in_blocks_equal_the_loop(ranks, layout):
    """B's experts are taken several at a time: by divisors of their number, or all, or none."""
    torch.manual_seed(0)
    total = sum(ranks)
    a, b, grad_a, grad_b = (
        torch.randn(*(reversed(shape) if layout == "transposed" else shape), dtype=torch.float64)
        for shape in [(total, 33), (37, total), (total, 33), (37, total)]
    )
    if layout == "transposed":
        a, b, grad_a, grad_b = a.T, b.T, grad_a.T, grad_b.T
    metrics = [metric_of(b, "a", ranks, "none"), metric_of(a, "b", ranks, "none")]
    (for_a, for_b), escalated = damped_inverses(metrics, 1e-2)
    assert escalated == 0
    found = (
        module.precondition(for_a, grad_a, "a", ranks, "none"),
        module.precondition(for_b, grad_b, "b", ranks, "none"),
    )
    expected = precondition_loop(a, b, grad_a, grad_b, ranks, 1e-2)
    for got, want in zip(found, expected, strict=True):
        assert got.is_contiguous()
        # Cholesky against LU: epsilon times the condition number, some hundreds here.
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_the_new_tf32_switch_is_read_without_an_error():
    """torch refuses to answer on the old one once it has been used, for the rest of a process."""
    program = """
import torch
from moelora_plugin.ops.precondition import _tf32_allowed
assert not _tf32_allowed()
torch.backends.cuda.matmul.fp32_precision = "tf32"
assert _tf32_allowed()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_hand_computed_numbers():
    """Two experts of rank 1: metrics 3^2 + 4^2 = 25 and 2^2 = 4; damping 1 divides by 26 and 5."""
    b = torch.tensor([[3.0, 2.0], [4.0, 0.0]])
    grad_a = torch.tensor([[26.0, 52.0], [5.0, -10.0]])
    inverses, _ = damped_inverses([gram(split_experts(b, (1, 1), 1))], 1.0)
    found = join_experts(inverses[0] @ split_experts(grad_a, (1, 1), 0), (1, 1), 0)
    torch.testing.assert_close(found, torch.tensor([[1.0, 2.0], [1.0, -2.0]]))


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3, 2), (6,)])
@pytest.mark.parametrize("dim", [0, 1])
def test_split_and_join_are_inverses(ranks, dim):
    factor = torch.randn(6, 5) if dim == 0 else torch.randn(5, 6)
    experts = split_experts(factor, ranks, dim)
    assert experts.shape == (len(ranks), max(ranks), 5)
    assert torch.equal(join_experts(experts, ranks, dim), factor)


def test_layers_of_one_size_are_inverted_together_and_come_back_in_order():
    torch.manual_seed(0)
    metrics = [gram(torch.randn(n, r, 8, dtype=torch.float64)) for n, r in [(3, 2), (1, 4), (2, 2)]]
    inverses, _ = damped_inverses(metrics, 0.5)
    for metric, inverse in zip(metrics, inverses, strict=True):
        eye = torch.eye(metric.shape[-1], dtype=metric.dtype)
        expected = torch.linalg.inv(metric + 0.5 * eye)
        # Cholesky against LU.
        torch.testing.assert_close(inverse, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_metrics_of_half_precision_factors_are_fp32(dtype):
    factor = torch.randn(2, 3, 64).to(dtype)
    metric = gram(factor)
    assert metric.dtype == torch.float32
    torch.testing.assert_close(metric, factor.float() @ factor.float().mT)
    assert damped_inverses([metric], 1e-6)[0][0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_singular_metric_gets_more_damping_and_is_counted(dtype):
    singular = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=dtype)
    zero, sound = torch.zeros(2, 2, dtype=dtype), torch.eye(2, dtype=dtype) * 4
    (inverses,), escalated = damped_inverses([torch.stack([singular, sound, zero])], 0.0)
    assert escalated == 2
    assert torch.isfinite(inverses).all()
    torch.testing.assert_close(inverses[1], sound / 16)  # the sound one gets no more than asked for
    # The rest are inverted with some small shift: nothing like the identity, which would be the
    # plain gradient.
    assert torch.equal(inverses[2], torch.diag(inverses[2].diagonal()))
    assert (inverses[2].diagonal() > 1e3).all()
    assert (inverses[0].diagonal() > 1e3).all()
    assert (inverses[0, [0, 1], [1, 0]] < -1e3).all()  # 1 / shift along (1, -1)


def test_damping_that_rounding_swallows_is_escalated_too():
    """1e8 + 1e-6 is 1e8 in fp32, so damping alone leaves this rank-one metric singular."""
    metric = torch.full((1, 2, 2), 1e8)
    (inverse,), escalated = damped_inverses([metric], 1e-6)
    assert escalated == 1
    assert torch.isfinite(inverse).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_an_error(bad):
    metric = torch.eye(2).repeat(3, 1, 1)
    metric[1, 0, 0] = bad
    with pytest.raises(
        FloatingPointError, match=r"NaN or infinite.*lower the learning rate \(lr\)"
    ):
        damped_inverses([metric], 1e-6)
