"""Each score: an example by hand, agreement with the slow oracle, and what holds for all of them.

`SCORES` is the list that the contracts run over: a new score is tested without a new test.
"""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
from adapted_llama import NEEDS, adapted_llama, checkpoint_activations, sentences
from peft import PeftModel
from tiny import tiny_llama

from moelora_plugin.errors import ConfigError
from moelora_plugin.ops.reference import (
    cosine_score_loop,
    embedding_score_loop,
    mlp_score_loop,
    multi_score_loop,
    prototype_score_loop,
    recurrent_score_loop,
    self_norm_score_loop,
    self_rank_score_loop,
)
from moelora_plugin.routers.scores import SCORES, Score
from moelora_plugin.types import LayerPlan, Rows

IN, EXPERTS, ROWS, IDS = 5, 4, 6, 64
# Both sides compute in float64 and sum in another order: some hundred roundings of 1e-16.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def plan(ranks: tuple[int, ...] = (1,) * EXPERTS) -> LayerPlan:
    return LayerPlan(num_experts=len(ranks), top_k=1, ranks=ranks, alpha=1.0)


def make(name: str, ranks: tuple[int, ...] = (1,) * EXPERTS, dtype=torch.float64, **options):
    torch.manual_seed(0)
    score = SCORES[name](IN, plan(ranks), **options).to(dtype)
    with torch.no_grad():
        for parameter in score.parameters():  # zero biases hide mistakes
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return score


def everything(
    dtype=torch.float64, rows: int = ROWS, total: int = EXPERTS
) -> tuple[Rows, torch.Tensor]:
    """Rows that have both features and ids, and an A; a score takes what it reads."""
    torch.manual_seed(1)
    x, a = torch.randn(rows, IN, dtype=dtype), torch.randn(total, IN, dtype=dtype)
    return Rows(x, ids=torch.arange(rows) % 5), a


def assert_agree(score: Score, expected_of, rows: Rows, a: torch.Tensor | None = None) -> None:
    """Values and the gradients of every parameter, of x and of A."""
    leaves = [*score.parameters()]
    for tensor in (rows.x, a):
        if tensor is not None:
            leaves.append(tensor.requires_grad_())
    weights = torch.randn(ROWS, EXPERTS, dtype=torch.float64)
    results = []
    for compute in (lambda: score(rows, a), expected_of):
        value = compute()
        grads = torch.autograd.grad((value * weights).sum(), leaves, allow_unused=True)
        results.append((value, grads))
    (value, grads), (expected, expected_grads) = results
    torch.testing.assert_close(value, expected, **CLOSE)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert (grad is None) == (expected_grad is None)
        if grad is not None:
            torch.testing.assert_close(grad, expected_grad, **CLOSE)


# By hand


def logits(name: str, x: list[float], a=None, ranks=(1, 1), options=None, **parameters):
    score = SCORES[name](len(x), plan(ranks), **(options or {})).double()
    with torch.no_grad():
        for key, value in parameters.items():
            getattr(score, key).copy_(torch.tensor(value, dtype=torch.float64))
    a = None if a is None else torch.tensor(a, dtype=torch.float64)
    rows = Rows(torch.tensor([x], dtype=torch.float64), ids=torch.tensor([1]))
    return score(rows, a)[0].tolist()


def test_mlp_by_hand():
    """Hidden (3, -4) -> relu (3, 0) -> (3 + 1, 6 - 1)."""
    keys = {
        "weight_0": [[1, 1], [-2, -1]],
        "bias_0": [0, 0],
        "weight_1": [[1, 5], [2, 7]],
        "bias_1": [1, -1],
    }
    assert logits("mlp", [1, 2], options={"width": 2}, **keys) == [4, 5]


def test_a_gated_mlp_by_hand():
    """MoA's swi_x 1: hidden width E; relu((3, -4)) * (2, 9) = (6, 0) -> (6, 12)."""
    found = logits(
        "mlp",
        [1, 2],
        options={"swi_x": 1, "gated": True, "bias": False},
        weight_0=[[1, 1], [-2, -1]],
        gate_0=[[0, 1], [5, 2]],
        weight_1=[[1, 5], [2, 7]],
    )
    assert found == [6, 12]


def test_an_mlp_of_depth_1_is_a_linear_gate():
    assert logits(
        "mlp", [1, 2], options={"depth": 1}, weight_0=[[1, 1], [0, 2]], bias_0=[0.5, 0]
    ) == [3.5, 4]


def test_cosine_by_hand():
    """cos 45 degrees and cos 180, over a temperature of 1/4; lengths do not matter."""
    found = logits("cosine", [3, 3], directions=[[7, 0], [-1, -1]], log_scale=[math.log(4)])
    assert found == pytest.approx([4 * math.sqrt(0.5), -4])


def test_the_cosine_of_a_zero_row_is_zero_and_its_gradient_finite():
    score, x = make("cosine"), torch.zeros(1, IN, dtype=torch.float64, requires_grad=True)
    value = score(Rows(x), None)
    value.sum().backward()
    assert value.tolist() == [[0.0] * EXPERTS]
    assert x.grad.isfinite().all()


def test_the_temperature_of_cosine_starts_as_configured_and_stays_above_a_hundredth():
    assert logits("cosine", [1, 0], options={"temperature": 0.5}, directions=[[1, 0], [0, 1]]) == (
        pytest.approx([2, 0])
    )
    assert logits("cosine", [1, 0], directions=[[1, 0], [0, 1]], log_scale=[99]) == (
        pytest.approx([100, 0])
    )


def test_prototype_by_hand():
    prototypes = [[1, -1], [2, 1]]
    assert logits("prototype", [1, 3], options={"compare": "dot"}, prototypes=prototypes) == [-2, 5]
    assert logits("prototype", [1, 3], prototypes=prototypes) == [2, 5]
    # Standardised (1, 3) is (-1, 1); (1, -1) and (2, 1) both are (1, -1): -2 / sqrt(2).
    found = logits("prototype", [1, 3], options={"compare": "standardized"}, prototypes=prototypes)
    assert found == pytest.approx([-math.sqrt(2)] * 2, rel=1e-4)  # layer_norm adds 1e-5 inside


def test_assigned_by_hand():
    """Two experts: ids 0 and 2 are the first one's, id 1 the second one's, without a doubt."""
    score = make("assigned", ranks=(1, 1))
    logits = score(Rows(None, ids=torch.tensor([0, 1, 2])), None)
    assert logits.softmax(-1).tolist() == [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    with pytest.raises(ConfigError, match="router_input"):
        score(Rows(torch.randn(2, IN)), None)


def test_embedding_by_hand():
    """The row's id is 1."""
    assert logits(
        "embedding", [0, 0], options={"width": None, "num_ids": 2}, embedding=[[1, 2], [3, 4]]
    ) == [3, 4]
    found = logits(
        "embedding",
        [0, 0],
        options={"width": 1, "num_ids": 2, "bias": True},
        embedding=[[5], [7]],
        gate=[[1], [-2]],
        gate_bias=[0, 1],
    )
    assert found == [7, -13]


def test_self_norm_by_hand():
    """A_1 x = (3, 4), A_2 x = (-6)."""
    assert logits("self_norm", [1, 2], a=[[1, 1], [0, 2], [-2, -2]], ranks=(2, 1)) == [5, 6]


def test_self_rank_by_hand():
    a = [[3, 0], [0, -2]]
    assert logits("self_rank", [1, 2], a=a) == [3, -4]
    assert logits("self_rank", [1, 2], a=a, options={"normalize": "rows"}) == pytest.approx(
        [0.6, -0.8]
    )
    assert logits("self_rank", [3, 4], a=a, options={"normalize": "cosine"}) == pytest.approx(
        [0.6, -0.8]
    )


def test_multi_by_hand():
    """Main (3/4, 1/4) of (1/2, 1/2) and (1/5, 4/5); with top 1 the first alone."""
    keys = {"main": [[math.log(3)], [0]], "sub": [[0], [0], [0], [math.log(4)]]}
    found = logits("multi", [1], options={"num_routers": 2}, **keys)
    assert found == pytest.approx([math.log(0.425), math.log(0.575)])
    found = logits("multi", [1], options={"num_routers": 2, "top": 1}, **keys)
    assert found == pytest.approx([math.log(0.5)] * 2)


def test_a_softmax_of_multi_is_the_mixture_itself():
    rows, _ = everything()
    score = make("multi")
    subs = score.sub.detach().view(3, EXPERTS, IN)
    mixture = multi_score_loop(rows.x, score.main.detach(), list(subs))
    torch.testing.assert_close(score(rows, None).softmax(-1), mixture, **CLOSE)


def test_recurrent_by_hand():
    """One rank, one width: h = tanh(1), p = softmax(0, h), m = p1 * 2 + p2 * 4, then a GRU.

    With zero weights the gates are 1/2 and the candidate 0, so the state halves.
    """
    zeros = dict.fromkeys(("bias_message", "bias_state"), [0.0] * 3)
    found = logits(
        "recurrent",
        [1, 1],
        a=[[2, 0], [0, 4]],
        options={"rounds": 2, "width": 1},
        projection=[[1, 0]],
        readout=[[0], [1]],
        weight_message=[[0]] * 3,
        weight_state=[[0]] * 3,
        **zeros,
    )
    assert found == pytest.approx([0, math.tanh(1) / 2])
    # A candidate that sees the message alone: tanh(m / 10), weighed half.
    share = 1 / (1 + math.exp(-math.tanh(1)))
    message = (1 - share) * 2 + share * 4
    found = logits(
        "recurrent",
        [1, 1],
        a=[[2, 0], [0, 4]],
        options={"rounds": 2, "width": 1},
        projection=[[1, 0]],
        readout=[[0], [1]],
        weight_message=[[0], [0], [0.1]],
        weight_state=[[0]] * 3,
        **zeros,
    )
    assert found == pytest.approx([0, math.tanh(1) / 2 + math.tanh(message / 10) / 2])


def test_static_by_hand():
    assert logits("static", [1, 2], options={"value": 1.0, "trainable": False}) == [1, 1]
    assert logits("static", [1, 2], logits=[0.5, -3]) == [0.5, -3]
    score = SCORES["static"](3, plan((1, 1)))
    assert score(Rows(None), None).shape == (1, 2)
    assert score(Rows(None, ids=torch.tensor([4, 5, 6])), None).shape == (3, 2)


# Against the oracles


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "tanh"])
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_mlp_is_its_formula(activation, depth, gated):
    score = make("mlp", activation=activation, depth=depth, gated=gated, width=3)
    rows, _ = everything()
    parts = [
        [getattr(score, f"{kind}_{layer}") for layer in range(depth)]
        for kind in ("weight", "bias", "gate")
    ]
    function = getattr(torch.nn.functional, activation)
    assert_agree(score, lambda: mlp_score_loop(rows.x, *parts, function), rows)


@pytest.mark.parametrize("width", [None, 3])
def test_cosine_is_its_formula(width):
    score = make("cosine", width=width)
    rows, _ = everything()

    def expected():
        temperature = (-score.log_scale).exp()
        return cosine_score_loop(rows.x, score.directions, temperature, score.projection)

    assert_agree(score, expected, rows)


@pytest.mark.parametrize("compare", ["dot", "abs", "standardized"])
def test_prototype_is_its_formula(compare):
    score = make("prototype", compare=compare, trainable=True)
    rows, _ = everything()
    assert_agree(score, lambda: prototype_score_loop(rows.x, score.prototypes, compare), rows)


@pytest.mark.parametrize("options", [{"width": None}, {"width": 3}, {"width": 3, "bias": True}])
def test_embedding_is_its_formula(options):
    score = make("embedding", num_ids=7, **options)
    rows = Rows(None, ids=torch.tensor([0, 6, 2, 2, 5, 1]))
    parts = score.embedding, score.gate, score.gate_bias
    assert_agree(score, lambda: embedding_score_loop(rows.ids.tolist(), *parts), rows)


@pytest.mark.parametrize("ranks", [(2, 2, 2, 2), (1, 3, 2, 1)], ids=["equal", "unequal"])
def test_self_norm_is_its_formula(ranks):
    score, (rows, a) = make("self_norm", ranks), everything(total=sum(ranks))
    assert_agree(score, lambda: self_norm_score_loop(rows.x, a, ranks), rows, a)


@pytest.mark.parametrize("normalize", ["none", "rows", "cosine"])
def test_self_rank_is_its_formula(normalize):
    score, (rows, a) = make("self_rank", normalize=normalize), everything()
    assert_agree(score, lambda: self_rank_score_loop(rows.x, a, normalize), rows, a)


@pytest.mark.parametrize("top", [None, 1, 2])
def test_multi_is_its_formula(top):
    score, (rows, _) = make("multi", top=top), everything()

    def expected():
        subs = list(score.sub.view(3, EXPERTS, IN))
        return multi_score_loop(rows.x, score.main, subs, top).log()

    assert_agree(score, expected, rows)


@pytest.mark.parametrize("rounds", [2, 4])
def test_recurrent_is_its_formula(rounds):
    ranks = (2,) * EXPERTS
    score, (rows, a) = make("recurrent", ranks, rounds=rounds, width=3), everything(total=8)
    cell = torch.nn.GRUCell(2, 3).double()
    for own, name in (
        (score.weight_message, "weight_ih"),
        (score.weight_state, "weight_hh"),
        (score.bias_message, "bias_ih"),
        (score.bias_state, "bias_hh"),
    ):
        delattr(cell, name)
        setattr(cell, name, own)  # the same leaf, so that its gradient is compared
    parts = score.projection, score.readout, cell, rounds
    assert_agree(score, lambda: recurrent_score_loop(rows.x, a, ranks, *parts), rows, a)


def test_a_universal_expert_is_not_scored():
    """Its ranks come last in A."""
    rows, a = everything()
    wider = torch.cat([a, torch.full((3, IN), 1e6, dtype=a.dtype)])
    for name in ("self_norm", "self_rank", "recurrent"):
        score = make(name)
        assert torch.equal(score(rows, wider), score(rows, a))


# Contracts

ALL = pytest.mark.parametrize("name", SCORES)


@ALL
def test_logits_have_a_row_each(name):
    rows, a = everything()
    assert make(name)(rows, a).shape == (ROWS, EXPERTS)


@ALL
def test_parameters_are_direct(name):
    """PEFT strips the adapter's name from a state-dict key only where it is last but one."""
    assert not list(make(name).children())


@ALL
def test_rows_do_not_see_each_other(name):
    score, (rows, a) = make(name), everything()
    together = score(rows, a)
    order = torch.randperm(ROWS)
    shuffled = score(Rows(rows.x[order], ids=rows.ids[order]), a)
    # One row or many go through other kernels of a matrix product.
    torch.testing.assert_close(shuffled, together[order], **CLOSE)
    for row in range(ROWS):
        alone = score(Rows(rows.x[row : row + 1], ids=rows.ids[row : row + 1]), a)
        torch.testing.assert_close(alone[0], together[row], **CLOSE)


@ALL
def test_a_score_says_what_it_reads(name):
    score, (rows, a) = make(name), everything()
    together = score(rows, a)
    other_x = score(Rows(rows.x.flip(0), ids=rows.ids), a)
    other_ids = score(Rows(rows.x, ids=rows.ids.flip(0)), a)
    assert torch.equal(other_x, together) != score.reads_input
    assert torch.equal(other_ids, together) != score.reads_ids


@ALL
def test_what_is_not_there_is_asked_for(name):
    score = make(name)
    if score.reads_input:
        with pytest.raises(ConfigError, match="router_input"):
            score(Rows(None, ids=torch.zeros(2, dtype=torch.long)), None)
    if score.reads_ids:
        with pytest.raises(ConfigError, match="router_input"):
            score(Rows(torch.zeros(2, IN, dtype=torch.float64)), None)


@ALL
def test_every_parameter_learns_unless_it_is_frozen(name):
    score, (rows, a) = make(name).requires_grad_(True), everything()
    value = score(rows, a)
    if value.requires_grad:
        (value * torch.randn_like(value)).sum().backward()
    for key, parameter in score.named_parameters():
        assert parameter.requires_grad == (key not in score.frozen_names)
        assert not parameter.requires_grad or parameter.grad.any(), key
    assert not list(score.buffers())


@ALL
def test_copies_and_pickles_give_the_same(name):
    score, (rows, a) = make(name), everything()
    for other in (copy.deepcopy(score), pickle.loads(pickle.dumps(score))):
        assert torch.equal(other(rows, a), score(rows, a))


@ALL
def test_parameters_are_drawn_by_the_seed(name):
    scores = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        scores.append(SCORES[name](IN, plan()))
    torch.manual_seed(0)
    scores[2].reset_parameters()
    for other in scores[1:]:
        assert other.state_dict().keys() == scores[0].state_dict().keys()
        for key, tensor in other.state_dict().items():
            assert tensor.isfinite().all()
            assert torch.equal(tensor, scores[0].state_dict()[key])


@ALL
def test_halves_and_autocast_are_near_single_precision(name):
    single, (rows, a) = make(name, dtype=torch.float32), everything(torch.float32)
    expected = single(rows, a)
    half = copy.deepcopy(single).bfloat16()
    found = half(Rows(rows.x.bfloat16(), ids=rows.ids), a.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        cast = single(rows, a)
    # bfloat16 keeps 8 bits: inputs, weights and each step of at most four round by 2^-9 of the
    # largest logit, which the temperature of `cosine` and the rounds of `recurrent` stretch.
    scale = expected.detach().abs().max().item() + 1
    for value in (found, cast):
        torch.testing.assert_close(value.float(), expected, rtol=0, atol=0.05 * scale)


@ALL
def test_a_meta_device_makes_no_values(name):
    with torch.device("meta"):
        score = SCORES[name](IN, plan())
    assert all(tensor.is_meta for tensor in score.state_dict().values())


@ALL
def test_one_graph_compiles(name):
    score, (rows, a) = make(name), everything()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, ids, a: score(Rows(x, ids=ids), a), fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(rows.x, rows.ids, a), score(rows, a))


def model_with(name: str, **keys) -> PeftModel:
    return adapted_llama(router_score=name, **{**NEEDS.get(name, {}), **keys})


def batch_for(rows: int = 3) -> dict[str, torch.Tensor]:
    ids = sentences(rows)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "task_id": torch.arange(rows)}


@ALL
def test_a_model_saves_and_loads_it_bitwise(name, tmp_path: Path):
    model = model_with(name)
    expected = model(**batch_for()).logits
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, **options)
        assert torch.equal(loaded(**batch_for()).logits, expected)


@ALL
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_gives_the_same_gradients(name, reentrant):
    gradients = []
    for checkpoint in (False, True):
        model = model_with(name).train()
        if checkpoint:
            model.enable_input_require_grads()
            checkpoint_activations(model, reentrant)
        batch = batch_for()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain
    assert plain.keys() == recomputed.keys()
    for key, grad in plain.items():
        assert torch.equal(grad, recomputed[key]), key


# Options


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("mlp", {"width": 2, "swi_x": 2}, "swi_x"),
        ("mlp", {"width": 0}, "width"),
        ("mlp", {"swi_x": 0}, "swi_x"),
        ("mlp", {"depth": 0}, "depth"),
        ("mlp", {"activation": "sine"}, "activation"),
        ("mlp", {"dropout": 1.0}, "dropout"),
        ("cosine", {"temperature": 0}, "temperature"),
        ("cosine", {"width": True}, "width"),
        ("prototype", {"compare": "l2"}, "compare"),
        ("embedding", {"num_ids": 0}, "num_ids"),
        ("embedding", {"width": 1.5}, "width"),
        ("embedding", {"width": None, "bias": True}, "bias"),
        ("self_rank", {"normalize": True}, "normalize"),
        ("multi", {"num_routers": 0}, "num_routers"),
        ("multi", {"num_routers": 2, "top": 3}, "top"),
        ("recurrent", {"rounds": 0}, "rounds"),
        ("recurrent", {"width": 0}, "width"),
    ],
)
def test_a_bad_option_names_its_key(name, options, key):
    with pytest.raises(ConfigError, match=rf"router_score_kwargs\['{key}'\]"):
        SCORES[name](IN, plan(), **options)


def test_ranks_that_a_score_cannot_compare_are_refused():
    with pytest.raises(ConfigError, match="r=1"):
        SCORES["self_rank"](IN, plan((1, 2)))
    with pytest.raises(ConfigError, match="one rank"):
        SCORES["recurrent"](IN, plan((1, 2)))


@pytest.mark.parametrize("name", ["self_norm", "self_rank", "recurrent"])
def test_experts_without_an_a_each_are_refused(name):
    rows, a = everything()
    for other in (None, a[:1]):
        with pytest.raises(ConfigError, match="expert='lora'"):
            make(name)(rows, other)


@pytest.mark.parametrize("index", [-1, IDS])
def test_an_id_out_of_range_is_refused(index):
    with pytest.raises(ConfigError, match="num_ids"):
        make("embedding")(Rows(None, ids=torch.tensor([0, index])), None)


def test_dropout_is_on_in_training_only():
    score, (rows, _) = make("mlp", dropout=0.5), everything()
    assert not torch.equal(score(rows, None), score(rows, None))
    score.eval()
    assert torch.equal(score(rows, None), score(rows, None))


def test_prototypes_are_frozen_unless_they_train():
    for trainable in (False, True):
        score = make("prototype", trainable=trainable).requires_grad_(True)
        assert {name: p.requires_grad for name, p in score.named_parameters()} == {
            "prototypes": trainable
        }


def test_prototypes_follow_the_experts():
    """|v . x| is largest over unit x where x is the first right singular vector of B A."""
    torch.manual_seed(0)
    pairs = [
        (torch.randn(2, IN, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64))
        for _ in range(EXPERTS)
    ]
    score = make("prototype")
    score.read_experts([*pairs, pairs[0]])  # with a universal expert
    for prototype, (a, b) in zip(score.prototypes, pairs, strict=True):
        expected = torch.linalg.svd(b @ a).Vh[0]
        assert abs(float(prototype @ expected)) == pytest.approx(1, abs=1e-10)
