"""Each auxiliary loss: an example by hand, and the formula written token by token."""

from __future__ import annotations

import math

import pytest
import torch

from moelora_plugin.errors import ConfigError
from moelora_plugin.losses import LOSSES, LossInput
from moelora_plugin.ops import reference
from moelora_plugin.types import Routing

F64 = torch.float64


def routing_of(probs, weights=None, logits=None, **extras) -> Routing:
    """A routing from plain lists; the gates are the probabilities unless given."""
    probs = torch.as_tensor(probs, dtype=F64)
    weights = probs if weights is None else torch.as_tensor(weights, dtype=F64)
    logits = probs.log() if logits is None else torch.as_tensor(logits, dtype=F64)
    extras = {name: torch.as_tensor(value, dtype=F64) for name, value in extras.items()}
    return Routing(logits, probs, weights, None, extras)


def topk_routing(logits: torch.Tensor, top_k: int = 2, **extras) -> Routing:
    probs = logits.softmax(-1)
    kept, ids = probs.topk(top_k)
    weights = torch.zeros_like(probs).scatter(-1, ids, kept / kept.sum(-1, keepdim=True))
    return Routing(logits, probs, weights, ids, extras)


def value(name: str, inputs: LossInput, **options) -> float:
    return LOSSES[name](inputs, **options).item()


EXACT = {"rel": 1e-12, "abs": 1e-12}  # a handful of roundings in float64


def test_switch_lb_by_hand():
    # Token 1 selects expert 0, token 2 expert 0 as well: f = (1, 0), P = (0.7, 0.3).
    routing = routing_of([[0.6, 0.4], [0.8, 0.2]], weights=[[1, 0], [1, 0]])
    assert value("switch_lb", LossInput(routing)) == pytest.approx(2 * 0.7, **EXACT)
    # Three selections in all, two of expert 0: f = (2/3, 1/3).
    routing = routing_of([[0.6, 0.4], [0.8, 0.2]], weights=[[0.6, 0.4], [1, 0]])
    expected = 2 * (2 / 3 * 0.7 + 1 / 3 * 0.3)
    assert value("switch_lb", LossInput(routing), share="selections") == pytest.approx(
        expected, **EXACT
    )


def test_z_by_hand():
    # log(e^0 + e^0) = log 2 and log(e^log3 + e^0) = log 4.
    routing = routing_of([[0.5, 0.5], [0.75, 0.25]], logits=[[0, 0], [math.log(3), 0]])
    expected = (math.log(2) ** 2 + math.log(4) ** 2) / 2
    assert value("z", LossInput(routing)) == pytest.approx(expected, **EXACT)


def test_importance_cv2_by_hand():
    # Summed gates 3 and 1: mean 2, variance 1.
    routing = routing_of([[0.5, 0.5]] * 4, weights=[[1, 0], [1, 0], [1, 0], [0, 1]])
    assert value("importance_cv2", LossInput(routing)) == pytest.approx(1 / 4, **EXACT)


def test_load_cv2_by_hand():
    # Without noise the probabilities are the load: sums 1.2 and 0.8, mean 1, variance 0.04.
    probs = [[0.5, 0.5], [0.7, 0.3]]
    assert value("load_cv2", LossInput(routing_of(probs))) == pytest.approx(0.04, **EXACT)
    # With it the router's own: sums 1.5 and 0.5, mean 1, variance 0.25.
    routing = routing_of(probs, load_probability=[[0.9, 0.1], [0.6, 0.4]])
    assert value("load_cv2", LossInput(routing)) == pytest.approx(0.25, **EXACT)


def test_localized_cv2_by_hand():
    # Two sequences of two tokens, types 1 and 0, two experts, delta 0.5. Importances (1.5, 0.5) and
    # (1, 1); times coefficients (1.5, 0.5) and (0.5, 1.5) they are 2.25, 0.25, 0.5, 1.5.
    weights = [[1.0, 0.0], [0.5, 0.5], [0.25, 0.75], [0.75, 0.25]]
    ids = {"task_id": torch.tensor([1, 1, 0, 0])}
    inputs = LossInput(routing_of([[0.5, 0.5]] * 4, weights=weights), ids=ids, batch=2)
    mean = 4.5 / 4
    variance = sum((x - mean) ** 2 for x in (2.25, 0.25, 0.5, 1.5)) / 3
    assert value("localized_cv2", inputs, delta=0.5) == pytest.approx(variance / mean**2, **EXACT)


def test_localized_cv2_is_least_where_importance_follows_the_types():
    # (1 + delta) times the own type's importance equals (1 - delta) times the other's.
    own, other = 0.25, 0.75  # delta 0.5
    ids = {"task_id": torch.tensor([1, 0])}
    routing = routing_of([[0.5, 0.5]] * 2, weights=[[own, other], [other, own]])
    inputs = LossInput(routing, ids=ids, batch=2)
    assert value("localized_cv2", inputs, delta=0.5) == pytest.approx(0, **EXACT)
    assert value("localized_cv2", inputs, delta=-0.5) > 0.5


def test_entropy_by_hand():
    routing = routing_of([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    assert value("entropy", LossInput(routing)) == pytest.approx(math.log(2) / 2, **EXACT)
    assert value("entropy", LossInput(routing), maximize=True) == pytest.approx(
        -math.log(2) / 2, **EXACT
    )
    # Sigmoid scores 0.9 and 0.3 count as shares 3/4 and 1/4.
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert value("entropy", LossInput(routing_of([[0.9, 0.3]]))) == pytest.approx(expected, **EXACT)


def test_rsl_by_hand():
    routing = routing_of([[0.5, 0.5], [0.5, 0.5]], weights=[[1, 0], [0, 1]])
    # f = P = (1/2, 1/2); the entropy of each token is log 2.
    expected = 0.5 - 0.2 * math.log(2)
    assert value("rsl", LossInput(routing), entropy=0.2) == pytest.approx(expected, **EXACT)


def test_lambda_sparsity_by_hand():
    # Logits 3, 2, 0: lower(2) = 1 - (5 - 0) = -4, lower(1) = 1 - (3 - 2) = 0.
    routing = routing_of([[0.7, 0.3, 0.0]], logits=[[2, 3, 0]], **{"lambda": [-4.5]})
    assert value("lambda_sparsity", LossInput(routing)) == pytest.approx(0.5, **EXACT)
    assert value("lambda_sparsity", LossInput(routing), k=1) == pytest.approx(4.5, **EXACT)
    assert value("lambda_sparsity", LossInput(routing), form="mean") == pytest.approx(5.5, **EXACT)


def sparsegen(logits, lam):
    """Support size by trying all of them (arXiv 1810.11975): the projection's own condition."""
    ordered = sorted(logits, reverse=True)
    return max(
        k for k in range(1, len(ordered) + 1) if 1 - lam + k * ordered[k - 1] > sum(ordered[:k])
    )


@pytest.mark.parametrize("k", [1, 2, 4])
def test_lambda_sparsity_is_zero_exactly_where_at_most_k_experts_are_active(k):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 5, generator=generator, dtype=F64)
    lambdas = 1 - 3 * torch.rand(200, generator=generator, dtype=F64)
    seen = set()
    for row, lam in zip(logits, lambdas, strict=True):
        active = sparsegen(row.tolist(), lam.item())
        routing = routing_of(row.softmax(0)[None], logits=row[None], **{"lambda": lam[None]})
        assert (value("lambda_sparsity", LossInput(routing), k=k) == 0) == (active <= k)
        seen.add(active <= k)
    assert seen == {True, False}


def test_contrastive_by_hand():
    # Two tokens, both select both experts; expert 0 always says (1, 0), expert 1 always (0, 1).
    outputs = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 3.0]]], dtype=F64)
    inputs = LossInput(routing_of([[0.5, 0.5]] * 2), outputs=lambda index: outputs[index])
    # Each of the four outputs has one positive of cosine 1 and two negatives of cosine 0.
    expected = -math.log(math.e / (math.e + 2))
    assert value("contrastive", inputs, temperature=1.0) == pytest.approx(expected, **EXACT)
    # A token that selects expert 0 alone takes no part in the other's pairs: two pairs are left,
    # of expert 0, with one negative, which is expert 1 on token 1.
    routing = routing_of([[0.5, 0.5]] * 2, weights=[[0.5, 0.5], [1, 0]])
    inputs = LossInput(routing, outputs=lambda index: outputs[index])
    expected = -math.log(math.e / (math.e + 1))
    assert value("contrastive", inputs, temperature=1.0) == pytest.approx(expected, **EXACT)


def test_contrastive_takes_tokens_spread_evenly_over_the_real_ones():
    asked = []

    def outputs(index):
        asked.append(index.tolist())
        return torch.ones(len(index), 2, 3, dtype=F64)

    real = torch.tensor([0, 1, 1, 1, 0, 1, 1, 1, 0, 0], dtype=torch.bool)
    routing = routing_of([[0.5, 0.5]] * 10)
    value("contrastive", LossInput(routing, real, outputs=outputs), max_tokens=3)
    assert asked == [[1, 3, 6]]


def test_contrastive_ignores_a_universal_expert_and_outputs_of_zero():
    outputs = torch.randn(4, 3, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    routing = routing_of([[0.5, 0.5]] * 4)
    with_universal = LossInput(routing, outputs=lambda index: outputs[index])
    without = LossInput(routing, outputs=lambda index: outputs[index, :2])
    assert value("contrastive", with_universal) == value("contrastive", without) > 0
    zero = torch.zeros(4, 2, 5, dtype=F64, requires_grad=True)
    loss = LOSSES["contrastive"](LossInput(routing, outputs=lambda index: zero[index]))
    loss.backward()
    assert loss.item() == 0
    assert not zero.grad.any()


def test_contrastive_of_one_expert_has_nothing_to_tell_apart():
    outputs = torch.randn(4, 2, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    outputs.requires_grad_()
    routing = routing_of([[0.9, 0.1]] * 4, weights=[[1, 0]] * 4)
    loss = LOSSES["contrastive"](LossInput(routing, outputs=lambda index: outputs[index]))
    loss.backward()
    assert loss.item() == 0
    assert not outputs.grad.any()


def test_orthogonal_by_hand():
    # A_0 = (1, 0), A_1 = (1, 1), A_2 = (0, 2); cosines squared 1/2, 0 and 1/2.
    rows = [[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]]
    columns = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    experts = [
        (torch.tensor([a], dtype=F64), torch.tensor([b], dtype=F64).T)
        for a, b in zip(rows, columns, strict=True)
    ]
    inputs = LossInput(routing_of([[1.0, 0.0, 0.0]]), experts=lambda: experts)
    assert value("orthogonal", inputs) == pytest.approx(1 / 3, **EXACT)
    # Updates b a^T: the cosine is the product of both cosines, squared 0, 0 and 1/2 * 1/2.
    assert value("orthogonal", inputs, of="ba") == pytest.approx(1 / 12, **EXACT)


def test_orthogonal_of_one_expert_and_of_zeros_is_zero():
    routing = routing_of([[1.0]])
    a, b = torch.ones(2, 3, dtype=F64), torch.zeros(4, 2, dtype=F64)
    assert value("orthogonal", LossInput(routing, experts=lambda: [(a, b)])) == 0
    pair = [(a, b), (a, b)]
    assert value("orthogonal", LossInput(routing, experts=lambda: pair), of="ba") == 0


# Against the loops ---------------------------------------------------------------------------

TOKENS, EXPERTS, SEQUENCES = 12, 4, 3


def leaves(seed=0):
    """What the losses depend on, with gradients; and which tokens are real."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64).requires_grad_()

    real = torch.ones(TOKENS, dtype=torch.bool)
    real[[3, 6, 7, 8, 9, 10, 11]] = False  # the last sequence is padding alone
    ranks = (2, 1, 3, 2)
    return {
        "logits": draw(TOKENS, EXPERTS),
        "lambda": draw(TOKENS),
        "load": draw(TOKENS, EXPERTS),
        "outputs": draw(TOKENS, EXPERTS, 5),
        **{f"a{i}": draw(rank, 6) for i, rank in enumerate(ranks)},
        **{f"b{i}": draw(5, rank) for i, rank in enumerate(ranks)},
    }, real


def as_input(given, real, batch=SEQUENCES) -> LossInput:
    extras = {"lambda": given["lambda"], "load_probability": given["load"].sigmoid()}
    types = torch.tensor([1, 0, 0])
    return LossInput(
        topk_routing(given["logits"], **extras),
        real,
        {"task_id": types.repeat_interleave(TOKENS // SEQUENCES)},
        lambda: [(given[f"a{i}"], given[f"b{i}"]) for i in range(EXPERTS)],
        lambda index: given["outputs"][index],
        batch,
    )


def by_loop(name, given, real, **options):
    routing = topk_routing(given["logits"])
    probs, weights = routing.probs[real], routing.weights[real]
    if name == "localized_cv2":
        size = TOKENS // SEQUENCES
        parts = zip(routing.weights.split(size), real.split(size), [1, 0, 0], strict=True)
        found = [(weights_SE[real_S], kind) for weights_SE, real_S, kind in parts if real_S.any()]
        sequences, types = zip(*found, strict=True)
        return reference.localized_cv2_loop(sequences, types, **options)
    if name == "orthogonal":
        pairs = [(given[f"a{i}"], given[f"b{i}"]) for i in range(EXPERTS)]
        return reference.orthogonal_loop(pairs, **options)
    return {
        "switch_lb": lambda: reference.switch_lb_loop(probs, weights, **options),
        "z": lambda: reference.z_loop(given["logits"][real]),
        "importance_cv2": lambda: reference.column_sums_cv_squared_loop(weights),
        "load_cv2": lambda: reference.column_sums_cv_squared_loop(given["load"].sigmoid()[real]),
        "entropy": lambda: reference.entropy_loop(probs),
        "rsl": lambda: reference.rsl_loop(probs, weights, **options),
        "lambda_sparsity": lambda: reference.lambda_sparsity_loop(
            given["logits"][real], given["lambda"][real], **options
        ),
        "contrastive": lambda: reference.contrastive_loop(
            given["outputs"][real], weights, **options
        ),
    }[name]()


CASES = [
    ("switch_lb", {}),
    ("switch_lb", {"share": "selections"}),
    ("z", {}),
    ("importance_cv2", {}),
    ("load_cv2", {}),
    ("localized_cv2", {}),
    ("localized_cv2", {"delta": -0.3}),
    ("entropy", {}),
    ("lambda_sparsity", {}),
    ("lambda_sparsity", {"k": 1}),
    ("lambda_sparsity", {"form": "mean"}),
    ("contrastive", {}),
    ("contrastive", {"temperature": 0.7}),
    ("orthogonal", {}),
    ("orthogonal", {"of": "ba"}),
    ("rsl", {"entropy": 0.3}),
]


def test_every_loss_has_a_loop():
    assert {name for name, _ in CASES} == set(LOSSES)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("padded", [False, True])
def test_value_and_gradients_are_the_loop_s(name, options, padded):
    found, real = leaves()
    expected = {key: leaf.detach().clone().requires_grad_() for key, leaf in found.items()}
    everything = torch.ones_like(real)
    real = real if padded else everything
    value = LOSSES[name](as_input(found, real if padded else None), **options)
    loop = by_loop(name, expected, real, **options)
    assert value.shape == ()
    assert value.dtype == F64
    # Sums of tens of numbers in float64, in another order; the temperature divides by 0.1.
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(value, loop, **close)
    value.backward()
    loop.backward()
    for key, leaf in expected.items():
        zero = torch.zeros_like(leaf)
        grad = zero if leaf.grad is None else leaf.grad
        torch.testing.assert_close(
            zero if found[key].grad is None else found[key].grad, grad, **close
        )
    assert any(leaf.grad is not None and leaf.grad.any() for leaf in found.values())


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("switch_lb", {"share": "token"}, "share"),
        ("localized_cv2", {"delta": 1.0}, "delta"),
        ("lambda_sparsity", {"form": "median"}, "form"),
        ("lambda_sparsity", {"k": EXPERTS}, "k"),
        ("lambda_sparsity", {"k": 0}, "k"),
        ("contrastive", {"temperature": 0.0}, "temperature"),
        ("contrastive", {"max_tokens": 1}, "max_tokens"),
        ("orthogonal", {"of": "b"}, "of"),
        ("rsl", {"entropy": math.nan}, "entropy"),
    ],
)
def test_an_option_out_of_range_is_refused_by_its_name(name, options, key):
    with pytest.raises(ConfigError, match=rf"aux_losses\['{name}'\]\['{key}'\]=.* must be "):
        LOSSES[name](as_input(*leaves()), **options)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("localized_cv2", "task_id"),
        ("lambda_sparsity", "router to 'sparsegen'"),
        ("contrastive", "site to 'linear'"),
        ("orthogonal", "site to 'linear'"),
    ],
)
def test_a_loss_names_what_it_lacks(name, named):
    with pytest.raises(ConfigError, match=named):
        LOSSES[name](LossInput(routing_of([[0.5, 0.5]])))


def test_switch_balance_sees_what_lies_above_a_learned_threshold():
    """AdaMoLE: two tokens that select expert 0 and one that selects expert 1; t is 0.2."""
    probs = torch.tensor([[0.7, 0.3], [0.9, 0.1], [0.4, 0.6]], dtype=torch.double)
    weights = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.double)
    threshold = torch.full((3,), 0.2, dtype=torch.double, requires_grad=True)
    routing = Routing(probs.log(), probs, weights, extras={"threshold": threshold})
    value = LOSSES["switch_lb"](LossInput(routing))
    # 2 * (2/3 * (2.0 - 0.6) / 3 + 1/3 * (1.0 - 0.6) / 3)
    torch.testing.assert_close(value.item(), 3.2 / 4.5)
    value.backward()
    assert (threshold.grad < 0).all()
