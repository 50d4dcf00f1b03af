"""The topk router: which gates it gives, whatever the logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moelora_plugin.ops.reference import topk_softmax_loop
from moelora_plugin.routers import TopKRouter
from moelora_plugin.routers.modifiers import RouterModifiers
from moelora_plugin.routers.scores import LinearScore
from moelora_plugin.types import LayerPlan, Routing, Rows


def route(weight: torch.Tensor, x: torch.Tensor, top_k: int) -> Routing:
    experts = weight.shape[0]
    plan = LayerPlan(num_experts=experts, top_k=top_k, ranks=(1,) * experts, alpha=1.0)
    score = LinearScore(weight.shape[1], plan).to(weight.dtype)
    with torch.no_grad():
        score.weight.copy_(weight)
    return TopKRouter(weight.shape[1], plan)(Rows(x), score, RouterModifiers([]))


def route_logits(logits: torch.Tensor, top_k: int) -> Routing:
    """Give the router these very logits: the identity as its weight."""
    return route(torch.eye(logits.shape[1], dtype=logits.dtype), logits, top_k)


@st.composite
def logits_and_top_k(draw) -> tuple[torch.Tensor, int]:
    experts = draw(st.integers(1, 12))
    # Whole numbers make ties likely; beyond +-80 a probability underflows to zero in fp32.
    values = st.one_of(st.integers(-3, 3).map(float), st.floats(-80, 80, width=32))
    rows = st.lists(st.lists(values, min_size=experts, max_size=experts), min_size=1, max_size=6)
    return torch.tensor(draw(rows)), draw(st.integers(1, experts))


@settings(max_examples=150, deadline=None)
@given(logits_and_top_k())
def test_k_gates_are_open_and_sum_to_one(case):
    logits, top_k = case
    routing = route_logits(logits, top_k)
    weights = routing.weights
    assert weights.shape == logits.shape
    assert (weights >= 0).all()
    assert routing.expert_ids.shape == (len(logits), top_k)
    # k terms, each rounded once, and their sum: k + 1 roundings at most.
    assert (weights.sum(1) - 1).abs().max() <= (top_k + 1) * torch.finfo(torch.float32).eps
    # Everything outside the selection is exactly zero, and the selection holds k different experts.
    selected = torch.zeros_like(weights, dtype=torch.bool).scatter(1, routing.expert_ids, True)
    assert (selected.sum(1) == top_k).all()
    assert not weights[~selected].any()
    # No expert outside has a larger probability than one inside.
    inside = routing.probs.masked_fill(~selected, math.inf).amin(1)
    outside = routing.probs.masked_fill(selected, -math.inf).amax(1)
    assert (inside >= outside).all()
    # A probability that is not lost to underflow keeps its gate open.
    assert ((weights > 0) == (selected & (routing.probs > 0))).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10), st.data())
def test_exactly_k_gates_are_open_for_logits_of_ordinary_size(experts, data):
    top_k = data.draw(st.integers(1, experts))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    weights = route_logits(torch.randn(5, experts) * 3, top_k).weights
    assert (weights.count_nonzero(1) == top_k).all()


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_a_zero_gate_ties_all_experts_and_still_selects_k(top_k):
    routing = route(torch.zeros(5, 3), torch.randn(7, 3), top_k)
    assert (routing.weights.count_nonzero(1) == top_k).all()
    opened = routing.weights[routing.weights > 0]
    torch.testing.assert_close(opened, torch.full((7 * top_k,), 1 / top_k))
    assert torch.equal(routing.probs, torch.full((7, 5), 0.2))


def test_hand_computed_gates():
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).log()  # probabilities 0.1, 0.2, 0.3, 0.4
    routing = route_logits(logits, 2)
    torch.testing.assert_close(routing.probs, torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    torch.testing.assert_close(routing.weights, torch.tensor([[0.0, 0.0, 3 / 7, 4 / 7]]))
    assert routing.expert_ids.tolist() == [[3, 2]]
    assert torch.equal(routing.logits, logits)


def test_a_token_with_nan_has_nan_gates_and_touches_no_other_token():
    torch.manual_seed(0)
    weight, x = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    clean = route(weight, x, 2).weights
    x[2, 1] = math.nan
    weights = route(weight, x, 2).weights
    assert weights[2].isnan().any()
    others = [0, 1, 3, 4]
    assert torch.equal(weights[others], clean[others])


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
def test_the_softmax_is_never_narrower_than_fp32(dtype):
    torch.manual_seed(0)
    routing = route_logits(torch.randn(6, 5).to(dtype), 3)
    wide = torch.promote_types(dtype, torch.float32)
    assert (routing.probs.dtype, routing.weights.dtype) == (wide, wide)
    expected = topk_softmax_loop(routing.logits.to(wide), 3)
    torch.testing.assert_close(routing.weights, expected)  # the same in another order


def test_only_a_single_expert_has_gates_that_ignore_the_input():
    one, two = (
        TopKRouter(3, LayerPlan(num_experts=n, top_k=1, ranks=(1,) * n, alpha=1.0)) for n in (1, 2)
    )
    assert one.fixed_weights().tolist() == [1.0]
    assert two.fixed_weights() is None
