"""Each router: an example by hand, and agreement with the slow oracle in value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from route_rows import make_modifiers, make_router, route_rows

from moelora_plugin.errors import ConfigError
from moelora_plugin.ops.reference import (
    expert_choice_loop,
    hard_loop,
    noisy_topk_loop,
    relu_loop,
    sigmoid_loop,
    sinkhorn_loop,
    softmax_loop,
    sparsegen_loop,
    threshold_loop,
    top_p_loop,
    topk_softmax_loop,
)
from moelora_plugin.routers import ROUTERS
from moelora_plugin.types import Rows

# Both sides compute in float64 and sum in another order: some hundred roundings of 1e-16.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def gates(name: str, logits: list[list[float]], top_k: int = 2, batch: int = 1, **options):
    """The gates of these very logits, in evaluation."""
    logits = torch.tensor(logits, dtype=torch.float64)
    router = make_router(name, logits.shape[1], top_k, **options).eval()
    return route_rows(router, logits, batch=batch).weights


def expect(found: torch.Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **CLOSE)


def logs(*rows: list[float]) -> list[list[float]]:
    """Logits whose softmax is these probabilities."""
    return [[math.log(p) for p in row] for row in rows]


TENTHS = logs([0.1, 0.2, 0.3, 0.4])


# By hand


def test_softmax_by_hand():
    expect(gates("softmax", TENTHS), [[0.1, 0.2, 0.3, 0.4]])


def test_topk_by_hand():
    expect(gates("topk", TENTHS), [[0, 0, 3 / 7, 4 / 7]])
    expect(gates("topk", TENTHS, renormalize=False), [[0, 0, 0.3, 0.4]])
    expect(gates("topk", TENTHS, weight="one"), [[0, 0, 1, 1]])


def test_topk_by_magnitude_by_hand():
    """FlyLoRA selects by |y|: the strongest, whatever its sign."""
    y = [[-3.0, 0.5, 1.0, -0.1]]
    expect(gates("topk", y, weight="one", by="magnitude"), [[1, 0, 1, 0]])
    e = math.e
    expect(gates("topk", y, by="magnitude"), [[e**3 / (e**3 + e), 0, e / (e**3 + e), 0]])
    # Far apart, where the smaller one's probability underflows, the order is still that of |y|.
    expect(gates("topk", [[3e3, -9e2, 8e2]], weight="one", by="magnitude"), [[1, 1, 0]])


def test_a_softmax_over_the_selected_logits_is_the_renormalised_one():
    """Why there is no option for it."""
    torch.manual_seed(0)
    logits = torch.randn(20, 6, dtype=torch.float64)
    kept, ids = logits.topk(3, dim=-1)
    after = torch.zeros_like(logits).scatter(-1, ids, kept.softmax(-1))
    expect(gates("topk", logits.tolist(), top_k=3), after.tolist())


def test_top_p_by_hand():
    expect(gates("top_p", TENTHS, p=0.35), [[0, 0, 0, 0.4]])  # crosses at once
    expect(gates("top_p", TENTHS, p=0.45), [[0, 0, 0.3, 0.4]])
    expect(gates("top_p", TENTHS), [[0, 0.2, 0.3, 0.4]])  # 0.8
    expect(gates("top_p", TENTHS, p=0.45, renormalize=True), [[0, 0, 3 / 7, 4 / 7]])


def test_threshold_by_hand():
    logits = torch.tensor(TENTHS, dtype=torch.float64)
    router = make_router("threshold", 4)
    with torch.no_grad():
        router.weight.zero_()
        router.bias.zero_()  # t = 1/2 * 1/4
    routing = route_rows(router, logits)
    assert routing.extras["threshold"].tolist() == [0.125]
    # 0.075, 0.175 and 0.275 above it: 0.525 together
    expect(routing.weights, [[0, 1 / 7, 1 / 3, 11 / 21]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threshold_where_nothing_is_above(dtype):
    nothing = make_router("threshold", 2, max_threshold=1.0).to(dtype)
    level = make_router("threshold", 2).to(dtype)
    with torch.no_grad():
        for router in (nothing, level):
            router.weight.zero_()
            router.bias.fill_(100.0)  # sigmoid is 1 to the last bit
    logits = torch.zeros(1, 2, dtype=dtype, requires_grad=True)
    closed, even = (route_rows(router, logits).weights for router in (nothing, level))
    assert closed.tolist() == [[0, 0]]
    assert even.tolist() == [[0.5, 0.5]]
    (closed + even).sum().backward()
    assert logits.grad.isfinite().all()


def test_sparsegen_by_hand():
    """With lambda = 0 it is sparsemax: (1, 0.8, -1) has tau = 0.4, so (0.6, 0.4, 0)."""
    router = make_router("sparsegen", 3, hidden=2, eps=1.0)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.zero_()
        router.lambda_bias.fill_(100.0)  # log sigmoid(100) = 0
    logits = torch.tensor([[1.0, 0.8, -1.0]], dtype=torch.float64)
    routing = route_rows(router, logits)
    expect(routing.weights, [[0.6, 0.4, 0]])
    expect(routing.extras["lambda"].unsqueeze(0), [[0.0]])
    # lambda = log sigmoid(0) = -log 2: (u - tau) / (1 + log 2), tau = (1.8 - 1 - log 2) / 2
    with torch.no_grad():
        router.lambda_bias.zero_()
    log2 = math.log(2)
    tau = (0.8 - log2) / 2
    routing = route_rows(router, logits)
    expect(routing.extras["lambda"].unsqueeze(0), [[-log2]])
    expect(routing.weights, [[(1 - tau) / (1 + log2), (0.8 - tau) / (1 + log2), 0]])
    assert torch.equal(routing.logits, logits)


def test_sparsegen_s_lambda_runs_from_one_expert_to_all():
    logits = torch.tensor([[0.3, 0.2, 0.1, 0.0]], dtype=torch.float64)
    router = make_router("sparsegen", 4)
    found = []
    for bias in (100.0, -300.0):
        with torch.no_grad():
            router.lambda_weight.zero_()
            router.lambda_bias.fill_(bias)
        found.append(route_rows(router, logits).weights)
    expect(found[0], [[1, 0, 0, 0]])  # lambda = 1 - eps
    # lambda = -299: the logits differ by 0.3 / 300 in all
    torch.testing.assert_close(found[1], torch.full_like(found[1], 0.25), rtol=0, atol=1e-3)


def test_sigmoid_by_hand():
    even, threes = [0.0, math.log(3), -math.log(3)], [0.5, 0.75, 0.25]
    expect(gates("sigmoid", [even]), [threes])
    sparse = make_router("sigmoid", 3, max_threshold=0.8)
    sparse.weight.zero_()
    sparse.bias.zero_()  # t = 0.4
    expect(route_rows(sparse, torch.tensor([even], dtype=torch.float64)).weights, [[0.5, 0.75, 0]])


def test_sigmoid_normalised_by_hand():
    scores = [0.0, math.log(3), -math.log(3)]  # 0.5, 0.75, 0.25
    expect(gates("sigmoid", [scores], normalize=True), [[1 / 3, 1 / 2, 1 / 6]])
    sparse = make_router("sigmoid", 3, max_threshold=0.8, normalize=True)
    sparse.weight.zero_()
    sparse.bias.zero_()  # t = 0.4
    found = route_rows(sparse, torch.tensor([scores], dtype=torch.float64)).weights
    expect(found, [[0.4, 0.6, 0]])


def test_relaxed_sigmoid_is_torch_s_relaxed_bernoulli():
    x, weight, logits = case(rows=4000)
    router = make_router("sigmoid", 5, width=7, relaxed=True)
    drawn = torch.distributions.RelaxedBernoulli(torch.ones(()), logits=logits.detach()).sample()
    ours = route_rows(router, x, weight).probs.detach().flatten().sort().values
    theirs = drawn.flatten().sort().values
    # Kolmogorov-Smirnov, two times 20,000 draws: 1.95 sqrt(2 / 20000) is passed once in a thousand.
    below = torch.searchsorted(theirs, ours) / len(theirs)
    assert (below - torch.arange(1, len(ours) + 1) / len(ours)).abs().max() < 0.0195
    assert torch.equal(route_rows(router.eval(), x, weight).probs, logits.sigmoid())


def test_sigmoid_s_threshold_trains_only_straight_through():
    fixed = make_router("sigmoid", 3, max_threshold=0.5)
    assert not any(parameter.requires_grad for parameter in fixed.parameters())
    assert sorted(fixed.state_dict()) == ["bias", "weight"]
    trained = make_router("sigmoid", 3, max_threshold=0.5, straight_through=True)
    assert sorted(trained.state_dict()) == ["bias", "weight"]
    trained.load_state_dict(fixed.state_dict())
    torch.manual_seed(0)
    x = torch.randn(5, 3, dtype=torch.float64)
    weights = route_rows(trained, x).weights
    assert torch.equal(weights, route_rows(fixed, x).weights)
    weights.sum().backward()
    # d/db of -sum_i s_i t over the rows: every expert's score counts, kept or not
    t = 0.5 * torch.sigmoid(x @ fixed.weight.T + fixed.bias)
    expected = -(x.sigmoid().sum(1, keepdim=True) * t * (1 - 2 * t)).sum()
    torch.testing.assert_close(trained.bias.grad, expected.reshape(1), **CLOSE)


def test_relu_by_hand():
    expect(gates("relu", [[-1.0, 0.0, 2.5]]), [[0, 0, 2.5]])


def test_hard_by_hand():
    expect(gates("hard", TENTHS, top_k=1), [[0, 0, 0, 1]])


def test_noisy_topk_by_hand():
    # H = (2, 1, 0) without noise; sigma = log 2
    router = make_router("noisy_topk", 3, top_k=1)
    logits = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    expect(route_rows(router.eval(), logits).weights, [[1, 0, 0]])
    assert route_rows(router, logits).extras == {}
    torch.manual_seed(0)
    noise = torch.randn(1, 3, dtype=torch.float64)
    torch.manual_seed(0)
    routing = route_rows(router.train(), logits)
    noisy = (logits + math.log(2) * noise)[0].tolist()
    best_of_others = [max(noisy[1:]), max(noisy[0], noisy[2]), max(noisy[:2])]
    found = routing.extras["load_probability"][0].tolist()
    for logit, other, probability in zip((2, 1, 0), best_of_others, found, strict=True):
        z = (logit - other) / math.log(2)
        # erf of two libraries
        assert probability == pytest.approx((1 + math.erf(z / math.sqrt(2))) / 2, rel=1e-12)
    assert torch.equal(routing.logits, logits)
    assert routing.weights.argmax() == max(range(3), key=lambda i: noisy[i])


def test_noisy_topk_with_next_to_no_noise_stays_finite():
    router = make_router("noisy_topk", 3, top_k=1, width=3).float()
    x = torch.tensor([[1.0, 0.5, 0.0]], requires_grad=True)
    with torch.no_grad():
        router.noise_weight.fill_(-1e4)  # softplus underflows to 0
    routing = route_rows(router, x)
    assert routing.extras["load_probability"].tolist() == [[1, 0, 0]]
    (routing.extras["load_probability"].sum() + routing.weights.sum()).backward()
    assert x.grad.isfinite().all()
    assert router.noise_weight.grad.isfinite().all()


def test_noisy_topk_of_all_experts_has_no_load_to_estimate():
    router = make_router("noisy_topk", 2, top_k=2)
    assert route_rows(router, torch.randn(4, 2, dtype=torch.float64)).extras == {}


def test_expert_choice_by_hand():
    """Three rows, two experts, c = 4/3: each expert takes two rows."""
    logits = logs([0.9, 0.1], [0.6, 0.4], [0.3, 0.7])
    expected = [[0.9, 0], [0.6, 0.4], [0, 0.7]]
    expect(gates("expert_choice", logits, capacity_factor=4 / 3), expected)
    # Two sequences, one row per expert: each chooses among its own rows.
    twice = [[0.9, 0], [0, 0.4], [0.9, 0], [0, 0.4]]
    short = logs([0.9, 0.1], [0.6, 0.4])
    expect(gates("expert_choice", short + short, top_k=1, batch=2), twice)


def test_expert_choice_gives_padding_no_room():
    logits = torch.tensor(logs([0.9, 0.1], [0.6, 0.4], [0.99, 0.01]), dtype=torch.float64)
    router = make_router("expert_choice", 2, top_k=1)  # n c / E = 2 * 1 / 2
    real = torch.tensor([True, True, False])
    expect(route_rows(router, logits, real=real).weights, [[0.9, 0], [0, 0.4], [0, 0]])


def test_every_expert_takes_a_row_that_is_alone():
    """As a new token of a generation is: 1 * 1 / 4 would be no row."""
    expect(gates("expert_choice", TENTHS, top_k=1), [[0.1, 0.2, 0.3, 0.4]])


def test_sinkhorn_by_hand():
    """Both rows like expert 0 best; balanced, the one that likes it less gets expert 1."""
    logits = torch.tensor(logs([0.9, 0.1], [0.6, 0.4]), dtype=torch.float64)
    router = make_router("sinkhorn", 2, top_k=1, iterations=1)
    # columns sum to 1.5 and 0.5: (0.6, 0.2), (0.4, 0.8)
    expect(route_rows(router.train(), logits).weights, [[0.9, 0], [0, 0.4]])
    expect(route_rows(router.eval(), logits).weights, [[0.9, 0], [0.6, 0]])


# Against the oracle


def compare(found, expected, *leaves: torch.Tensor) -> None:
    """Value, and the gradient of a random weighting with respect to each leaf."""
    torch.testing.assert_close(found, expected, **CLOSE)
    weighting = torch.randn(found.shape, dtype=found.dtype)
    ours, theirs = (
        torch.autograd.grad((weighting * value).sum(), leaves, retain_graph=True)
        for value in (found, expected)
    )
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, **CLOSE)
        assert our.any()


def case(rows: int = 12, experts: int = 5, width: int = 7, scale: float = 1.0):
    torch.manual_seed(0)
    x = torch.randn(rows, width, dtype=torch.float64)
    weight = (scale * torch.randn(experts, width, dtype=torch.float64)).requires_grad_()
    return x, weight, x @ weight.T


@pytest.mark.parametrize(
    ("name", "options", "oracle"),
    [
        ("softmax", {}, softmax_loop),
        ("topk", {}, lambda logits: topk_softmax_loop(logits, 2)),
        ("top_p", {"p": 0.7}, lambda logits: top_p_loop(logits, 0.7)),
        ("top_p", {"p": 0.05}, lambda logits: top_p_loop(logits, 0.05)),
        ("top_p", {"p": 1.0}, softmax_loop),
        ("relu", {}, relu_loop),
        ("sigmoid", {}, sigmoid_loop),
        ("expert_choice", {}, lambda logits: expert_choice_loop(logits, 2, 3)),
        (
            "expert_choice",
            {"capacity_factor": 0.9},
            lambda logits: expert_choice_loop(logits, 0.9, 3),
        ),
    ],
)
def test_gates_agree_with_the_oracle(name, options, oracle):
    x, weight, logits = case()
    router = make_router(name, 5, width=7, **options)
    compare(route_rows(router, x, weight, batch=3).weights, oracle(logits), weight)


@pytest.mark.parametrize("max_threshold", [None, 0.4, 1.0])
def test_threshold_agrees_with_the_oracle(max_threshold):
    x, weight, logits = case()
    router = make_router("threshold", 5, width=7, max_threshold=max_threshold)
    threshold = (max_threshold or 0.2) * torch.sigmoid(x @ router.weight.T + router.bias)
    found = route_rows(router, x, weight)
    expected = threshold_loop(logits, threshold.squeeze(1))
    compare(found.weights, expected, weight, router.weight, router.bias)
    torch.testing.assert_close(found.probs, softmax_loop(logits), **CLOSE)


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_sparsegen_agrees_with_the_oracle(scale):
    x, weight, logits = case(scale=scale)
    router = make_router("sparsegen", 5, width=7, hidden_init=0.0)
    hidden = torch.relu(x @ router.hidden_weight.T + router.hidden_bias)
    raw = (hidden @ router.lambda_weight.T + router.lambda_bias).squeeze(1)
    lambda_N = -torch.log(1 + torch.exp(-raw)) + 0.99
    found = route_rows(router, x, weight)
    compare(found.weights, sparsegen_loop(logits, lambda_N), weight, *router.parameters())
    compare(found.extras["lambda"], lambda_N, *router.parameters())
    # Both one expert and several occur among the rows.
    assert len(set((found.weights > 0).sum(1).tolist())) > 1


def test_sparse_sigmoid_agrees_with_the_oracle():
    x, weight, logits = case()
    router = make_router("sigmoid", 5, width=7, max_threshold=0.5)
    threshold = 0.5 * torch.sigmoid(x @ router.weight.T + router.bias).squeeze(1)
    found = route_rows(router, x, weight).weights
    assert (found == 0).any()
    compare(found, sigmoid_loop(logits, threshold), weight)


@pytest.mark.parametrize("top_k", [1, 3])
def test_noisy_topk_agrees_with_the_oracle(top_k):
    x, weight, logits = case()
    router = make_router("noisy_topk", 5, top_k, width=7)
    torch.nn.init.normal_(router.noise_weight)
    sigma = torch.log(1 + torch.exp(x @ router.noise_weight.T))
    torch.manual_seed(1)
    noise = torch.randn_like(sigma)
    torch.manual_seed(1)
    found = route_rows(router, x, weight)
    expected, load = noisy_topk_loop(logits, sigma, noise, top_k)
    if top_k == 1:  # a constant 1: nothing to learn from the gates
        torch.testing.assert_close(found.weights, expected, **CLOSE)
    else:
        compare(found.weights, expected, weight, router.noise_weight)
    compare(found.extras["load_probability"], load, weight, router.noise_weight)


@pytest.mark.parametrize("padded", [False, True])
def test_sinkhorn_selects_by_the_oracle_s_plan(padded):
    x, weight, logits = case(rows=30, scale=2.0)
    real = torch.rand(30) < 0.7 if padded else None
    router = make_router("sinkhorn", 5, width=7, iterations=5)
    routing = route_rows(router, x, weight, real=real)
    selected = hard_loop(sinkhorn_loop(logits, 5, real), top_k=2)
    expected = softmax_loop(logits) * selected
    rows = slice(None) if real is None else real
    compare(routing.weights[rows], expected[rows], weight)
    if padded:  # which would have changed the selection
        everything = route_rows(router, x, weight).weights[rows]
        assert not torch.equal(everything > 0, routing.weights[rows] > 0)


def test_sinkhorn_evens_out_the_load():
    torch.manual_seed(0)
    logits = torch.randn(200, 5, dtype=torch.float64)
    logits[:, 0] += 2  # a favourite
    router = make_router("sinkhorn", 5)
    balanced, plain = (
        (route_rows(router.train(training), logits).weights > 0).sum(0)
        for training in (True, False)
    )
    # 80 rows each would be even.
    assert plain[0] > 150
    assert balanced.min() > 60
    assert balanced.max() < 100


def test_sinkhorn_does_not_overflow():
    router = make_router("sinkhorn", 3).float()
    routing = route_rows(router, torch.randn(8, 3) * 1e4)
    assert routing.weights.isfinite().all()


def test_hard_and_weight_one_agree_with_the_oracle():
    x, weight, logits = case()
    hard = route_rows(make_router("hard", 5, 1, width=7), x, weight).weights
    assert torch.equal(hard, hard_loop(logits.detach()))
    assert not hard.requires_grad
    one = make_router("topk", 5, 3, width=7, weight="one", by="magnitude")
    found = route_rows(one, x, weight).weights
    assert torch.equal(found, hard_loop(logits.detach().abs(), 3))
    assert not found.requires_grad


def test_hard_straight_through_has_the_probabilities_gradient():
    x, weight, logits = case()
    found = route_rows(make_router("hard", 5, 1, width=7, straight_through=True), x, weight).weights
    probs = softmax_loop(logits)
    compare(found, hard_loop(logits.detach()) + probs - probs.detach(), weight)
    assert set(found.unique().tolist()) == {0.0, 1.0}


# Options and errors


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("topk", {"weight": "two"}, "weight"),
        ("topk", {"by": "name"}, "by"),
        ("top_p", {"p": 0.0}, "p"),
        ("top_p", {"p": 1.1}, "p"),
        ("threshold", {"max_threshold": 0}, "max_threshold"),
        ("threshold", {"max_threshold": 2.0}, "max_threshold"),
        ("sparsegen", {"hidden": 0}, "hidden"),
        ("sparsegen", {"eps": 0}, "eps"),
        ("sigmoid", {"max_threshold": 0}, "max_threshold"),
        ("sigmoid", {"straight_through": True}, "max_threshold"),
        ("expert_choice", {"capacity_factor": 0}, "capacity_factor"),
        ("sinkhorn", {"iterations": 0}, "iterations"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(name, options, key):
    with pytest.raises(ConfigError, match=rf"router_kwargs\['{key}'\]"):
        make_router(name, 3, **options)


def test_hard_refuses_more_than_one_expert():
    with pytest.raises(ConfigError, match=r"top_k=2.*set top_k to 1"):
        make_router("hard", 3, top_k=2)


@pytest.mark.parametrize("name", [name for name, router in ROUTERS.items() if router.reads_input])
def test_a_router_that_reads_the_input_says_so_where_there_is_none(name):
    class Static(torch.nn.Module):
        def forward(self, rows, a):
            return torch.zeros(1, 3)

    router = make_router(name, 3)
    with pytest.raises(ConfigError, match="router_input"):
        router(Rows(None), Static(), make_modifiers(3))


def test_only_one_expert_whose_share_is_the_whole_has_fixed_gates():
    for name in ROUTERS:
        assert make_router(name, 2, top_k=1).fixed_weights() is None, name
        one = make_router(name, 1, top_k=1).fixed_weights()
        if name in ("sigmoid", "relu"):  # a gate that depends on the input all the same
            assert one is None
        else:
            assert one.tolist() == [1.0], name
    assert make_router("expert_choice", 1, top_k=1, capacity_factor=0.5).fixed_weights() is None
