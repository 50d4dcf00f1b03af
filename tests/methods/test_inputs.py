"""Each router input: an example by hand, agreement with the slow oracle, and what holds for all.

`INPUTS` is the list that the contracts run over: a new input is tested without a new test.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from adapted_llama import NEEDS, adapted_llama, cache_of, checkpoint_activations, sentences
from peft import PeftModel, get_peft_model

from moelora_plugin import MoeLoraConfig, routing_ids
from moelora_plugin.call import Call
from moelora_plugin.errors import ConfigError
from moelora_plugin.model import routed_layers
from moelora_plugin.ops.reference import pool_loop
from moelora_plugin.routers.inputs import INPUTS

ALL = pytest.mark.parametrize("name", INPUTS)
POOLED = pytest.mark.parametrize("name", ["sequence", "prompt"])
PAD = 2
# Other shapes take other kernels: some hundred roundings of fp32 on logits of size 10 in a network
# that multiplies them along the way.
NEAR = {"rtol": 1e-3, "atol": 1e-4}


def model_with(name: str, **keys) -> PeftModel:
    return adapted_llama(router_input=name, **{"router": "topk", **NEEDS.get(name, {}), **keys})


def padded(ids: torch.Tensor, lengths: list[int], left: bool) -> dict[str, torch.Tensor]:
    """The first tokens of each row, padded to the longest."""
    longest = max(lengths)
    rows, masks = [], []
    for row, length in zip(ids, lengths, strict=True):
        filler = torch.full((longest - length,), PAD)
        mask = torch.tensor([0] * len(filler) + [1] * length)
        rows.append(torch.cat([filler, row[:length]] if left else [row[:length], filler]))
        masks.append(mask if left else mask.flip(0))
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}


def all_ids(rows: int) -> dict[str, torch.Tensor]:
    return {"task_id": torch.arange(rows) % 3, "cluster_id": torch.arange(rows) % 2}


# By hand


X = torch.tensor([[[1.0, 8.0], [3.0, 4.0], [5.0, 6.0]], [[2.0, 0.0], [7.0, 1.0], [9.0, 9.0]]])
MASK = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ("mean", [[2, 6], [8, 5]]),
        ("max", [[3, 8], [9, 9]]),
        ("first", [[1, 8], [7, 1]]),
        ("last", [[3, 4], [9, 9]]),
    ],
)
def test_sequences_are_pooled_by_hand(pool, expected):
    rows = INPUTS["sequence"](pool=pool).rows(X, Call(shape=(2, 3), real_BS=MASK))
    assert rows.x.tolist() == expected
    assert (rows.batch, rows.row_of_token.tolist()) == (2, [0, 0, 0, 1, 1, 1])


def test_a_prompt_is_what_stands_before_the_answer_by_hand():
    """The second sequence is all answer, so its first real token decides."""
    prompt = torch.tensor([[1, 0, 0], [0, 0, 0]]).bool()
    rows = INPUTS["prompt"]().rows(X, Call(shape=(2, 3), real_BS=MASK, prompt_BS=prompt))
    assert rows.x.tolist() == [[1, 8], [7, 1]]


@pytest.mark.parametrize(("name", "key"), [("task", "task_id"), ("cluster", "cluster_id")])
def test_ids_by_hand(name, key):
    rows = INPUTS[name]().rows(X, Call(shape=(2, 3), ids={key: torch.tensor([5, 1])}))
    assert rows.x is None
    assert (rows.ids.tolist(), rows.row_of_token.tolist()) == ([5, 1], [0, 0, 0, 1, 1, 1])
    for one in (Call(ids={key: torch.tensor(4)}), Call()):
        rows = INPUTS[name](default=4).rows(X, one)
        assert (rows.ids.tolist(), rows.row_of_token.tolist()) == ([4], [0] * 6)
        assert INPUTS[name](default=4).fixed_rows(one).ids.tolist() == [4]
    assert INPUTS[name]().fixed_rows(Call()) is None
    assert INPUTS[name]().fixed_rows(Call(ids={key: torch.tensor([4, 4])})) is None


def test_none_is_one_row_by_hand():
    rows = INPUTS["none"]().rows(X, Call())
    assert rows.x is None
    assert rows.row_of_token.tolist() == [0] * 6
    assert INPUTS["none"]().fixed_rows(Call()) is not None


def test_tokens_by_hand():
    rows = INPUTS["token"]().rows(X, Call(shape=(2, 3), real_BS=MASK))
    assert torch.equal(rows.x, X.view(6, 2))
    assert (rows.real.tolist(), rows.row_of_token) == (MASK.flatten().tolist(), None)


# Against the oracle


@pytest.mark.parametrize("pool", ["mean", "max", "first", "last"])
def test_pooling_is_its_formula(pool):
    torch.manual_seed(0)
    x = torch.randn(8, 5, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(8, 5) < 0.5
    mask[:3] = False
    mask[1, 0] = mask[2, -1] = True
    weights = torch.randn(8, 3, dtype=torch.float64)
    found = INPUTS["sequence"](pool=pool).rows(x, Call(shape=(8, 5), real_BS=mask)).x
    expected = pool_loop(x, mask, pool)
    grads = [torch.autograd.grad((value * weights).sum(), x)[0] for value in (found, expected)]
    # Five numbers of size 1 in float64, summed in another order.
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(*grads, rtol=1e-13, atol=1e-14)


@POOLED
@pytest.mark.parametrize("pool", ["mean", "max", "first", "last"])
def test_what_stands_at_padding_does_not_count(name, pool):
    spoilt = X.masked_fill(~MASK.unsqueeze(-1), torch.inf)
    call = Call(shape=(2, 3), real_BS=MASK)
    clean, dirty = (INPUTS[name](pool=pool).rows(x, call).x for x in (X, spoilt))
    assert torch.equal(clean, dirty)


# Contracts


@ALL
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_neither_padding_nor_company_has_influence(name, left):
    """Each sequence alone gives what it gives in a padded batch, in whatever order."""
    model, ids, lengths = model_with(name), sentences(3), [7, 4, 5]
    batch = {**padded(ids, lengths, left), **all_ids(3)}
    together = model(**batch).logits
    for row, length in enumerate(lengths):
        own = {key: value[row : row + 1] for key, value in all_ids(3).items()}
        alone = model(input_ids=ids[row : row + 1, :length], **own).logits[0]
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(together[row, real], alone, **NEAR)
    order = torch.tensor([2, 0, 1])
    shuffled = model(**{key: value[order] for key, value in batch.items()}).logits
    real = batch["attention_mask"][order].bool()
    torch.testing.assert_close(shuffled[real], together[order][real], **NEAR)


@ALL
def test_the_same_call_gives_the_same_bits_in_copies_too(name):
    model = model_with(name)
    batch = {"input_ids": sentences(3), **all_ids(3)}
    expected = model(**batch).logits
    assert torch.equal(model(**batch).logits, expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**batch).logits, expected)
        for layer in routed_layers(other).values():  # and knows no other model's calls
            assert layer.shared.call is not next(iter(routed_layers(model).values())).shared.call


@ALL
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the reference's call
def test_recomputation_sees_its_own_call(name, reentrant):
    """Two calls before one backward, others in between: each is recomputed as it was."""
    batches = []
    for seed, lengths in ((1, [7, 4, 6]), (2, [3, 6, 5])):
        batch = {**padded(sentences(3, seed=seed), lengths, seed == 2), **all_ids(3)}
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, : 2 + seed] = -100
        batches.append({**batch, "labels": labels})
    batches[1]["task_id"] = batches[1]["task_id"].flip(0)
    gradients = []
    for checkpoint in (False, True):
        model = model_with(name).train()
        if checkpoint:
            checkpoint_activations(model, reentrant)
        losses = [model(**batches[0]).loss]
        with torch.no_grad():
            model(input_ids=sentences(4, 9), **all_ids(4))
        losses.append(model(**batches[1]).loss)
        model.eval()
        model(input_ids=sentences(2, 3), **all_ids(2))  # with gradients on, by mistake
        model.train()
        sum(losses).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain
    assert plain.keys() == recomputed.keys()
    for key, grad in plain.items():
        assert torch.equal(grad, recomputed[key]), key


def steps(model: PeftModel, ids: torch.Tensor, count: int, **options) -> torch.Tensor:
    """Logits of `count` generated tokens (rows, count, vocabulary)."""
    out = model.generate(
        **padded(ids, [7, 4, 5], left=True),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.stack(out.logits, 1), out.sequences


@ALL
def test_generation_continues_as_one_pass_over_all(name):
    """With a cache and left padding, the logits are those of one call over prompt and answer.

    The labels of that call say where the answer begins.
    """
    model, ids = model_with(name), sentences(3)
    with routing_ids(model, **all_ids(3)):
        logits, sequences = steps(model, ids, 4)
        prompt = padded(ids, [7, 4, 5], left=True)
        mask = torch.cat([prompt["attention_mask"], torch.ones(3, 4, dtype=torch.long)], 1)
        labels = sequences.clone()
        labels[:, :7] = -100
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        if name == "sequence":  # decided at the first call, which "prompt" does as well
            for layer in routed_layers(model).values():
                layer.moelora_input["default"] = INPUTS["prompt"]()
        whole = model(
            input_ids=sequences, attention_mask=mask, labels=labels, position_ids=positions
        ).logits
    torch.testing.assert_close(logits, whole[:, 6:-1], **NEAR)


@ALL
def test_beams_have_their_sequence_s_experts(name):
    """A batch of beam searches gives what each gives alone."""
    model, ids, lengths = model_with(name), sentences(3), [7, 4, 5]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options |= {"num_beams": 3, "num_return_sequences": 2}
    with routing_ids(model, **all_ids(3)):
        together = model.generate(**padded(ids, lengths, left=True), **options)
    each = len(together) // 3
    for row, length in enumerate(lengths):
        with routing_ids(model, **{key: int(value[row]) for key, value in all_ids(3).items()}):
            alone = model.generate(input_ids=ids[row : row + 1, :length], **options)
        assert torch.equal(together[row * each : (row + 1) * each, 7:], alone[:, length:])


@ALL
def test_a_static_cache_is_like_any_other(name):
    model, ids = model_with(name), sentences(3)
    with routing_ids(model, **all_ids(3)):
        _, dynamic = steps(model, ids, 4)
        _, static = steps(model, ids, 4, cache_implementation="static")
        _, again = steps(model, ids, 4, cache_implementation="static")
    assert torch.equal(static, dynamic)
    assert torch.equal(again, dynamic)


@POOLED
def test_generations_may_take_turns(name):
    """Each cache has the decision of the call that began it."""
    model, first, second = model_with(name), sentences(2, seed=1), sentences(2, seed=2)
    token = torch.full((2, 1), 7)

    def step(cache) -> torch.Tensor:
        return model(input_ids=token, **cache, use_cache=True).logits

    with torch.no_grad():
        alone = [step(cache_of(model(input_ids=ids, use_cache=True))) for ids in (first, second)]
        caches = [cache_of(model(input_ids=ids, use_cache=True)) for ids in (first, second)]
        turns = [step(cache) for cache in caches]
    assert all(torch.equal(a, b) for a, b in zip(alone, turns, strict=True))
    assert not torch.equal(*turns)


@POOLED
def test_a_step_without_its_beginning_is_refused(name):
    model, ids = model_with(name), sentences(2)
    with torch.no_grad(), model.disable_adapter():
        cache = cache_of(model(input_ids=ids, use_cache=True))
    with pytest.raises(ConfigError, match="use_cache=False"):
        model(input_ids=ids[:, :1], **cache)


def test_training_without_labels_finds_no_prompt():
    model = model_with("prompt").train()
    with pytest.raises(ConfigError, match="labels"):
        model(input_ids=sentences())
    with torch.no_grad():
        model(input_ids=sentences())  # what generation does in training mode


def test_the_answer_does_not_decide_about_the_prompt():
    model, ids = model_with("prompt").train(), sentences(2)
    other = ids.clone()
    other[:, 4:] = sentences(2, 3, seed=5)
    labels = [row.clone().index_fill(1, torch.arange(4), -100) for row in (ids, other)]
    before, after = (
        model(input_ids=row, labels=label).logits[:, :4]
        for row, label in zip((ids, other), labels, strict=True)
    )
    assert torch.equal(before, after)
    model = model_with("sequence").train()
    before, after = (model(input_ids=row).logits[:, :4] for row in (ids, other))
    assert not torch.equal(before, after)


# Layers that see something else


@POOLED
def test_flat_tokens_are_taken_apart_by_the_call(name):
    call = Call(shape=(2, 3), real_BS=MASK)
    flat, whole = (INPUTS[name]().rows(x, call) for x in (X.view(6, 2), X))
    assert torch.equal(flat.x, whole.x)
    assert torch.equal(flat.row_of_token, whole.row_of_token)


@POOLED
def test_tokens_that_are_no_sequences_are_refused(name):
    for call in (Call(), Call(shape=(2, 4))):
        with pytest.raises(ConfigError, match="exclude_modules"):
            INPUTS[name]().rows(X.view(6, 2), call)


def test_an_image_s_patches_have_no_mask():
    call = Call(shape=(2, 5), real_BS=torch.zeros(2, 5).bool())
    found = INPUTS["sequence"]().rows(X, call.seen_by("", X))
    assert found.x.tolist() == X.mean(1).tolist()
    with pytest.raises(ConfigError, match="exclude_modules"):
        INPUTS["prompt"]().rows(X, call)


def test_padding_that_a_layer_s_tokens_do_not_show_is_refused():
    """A model may pool, pad or subsample its tokens, and the mask is that of its arguments."""
    every = torch.ones(2, 5).bool()
    whole = INPUTS["sequence"]().rows(X, Call(shape=(2, 5), real_BS=every))
    assert whole.x.tolist() == X.mean(1).tolist()
    with pytest.raises(ConfigError, match="exclude_modules"):
        INPUTS["sequence"]().rows(X, Call(shape=(2, 5), real_BS=every & (X.new_zeros(2, 5) > 0)))


def test_ids_need_layers_that_see_their_sequences():
    two = {"task_id": torch.tensor([1, 0])}
    task = INPUTS["task"]()
    flat = task.rows(X.view(6, 2), Call(shape=(2, 3), ids=two))
    assert flat.row_of_token.tolist() == [0, 0, 0, 1, 1, 1]
    assert task.rows(X[:, 0], Call(shape=(2, 3), ids=two)).row_of_token.tolist() == [0, 1]
    assert task.rows(X.view(6, 2), Call(ids=two)).row_of_token.tolist() == [0, 0, 0, 1, 1, 1]
    for x in (X[:1], X.view(6, 2)[:4]):
        with pytest.raises(ConfigError, match="exclude_modules"):
            task.rows(x, Call(shape=(2, 3), ids=two))
    one = Call(shape=(2, 3), ids={"task_id": torch.tensor(1)})
    assert task.rows(X[:1], one).row_of_token.tolist() == [0, 0, 0]


@ALL
def test_a_plain_network_works_or_says_why_not(name):
    """No model of transformers: no mask, no labels, flat tokens."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    options = {"router_input": name, "target_modules": ["0"], "num_experts": 2, "top_k": 1}
    get_peft_model(net, MoeLoraConfig(**{**NEEDS.get(name, {}), **options}))
    x = torch.randn(6, 4)
    if name in ("token", "none"):
        assert net(x).shape == (6, 4)
        return
    with pytest.raises(ConfigError, match=f"router_input='{name}'"):
        net(x)
    with routing_ids(net, task_id=1, cluster_id=1):
        assert net(x.view(2, 3, 4)).shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("name", "options"),
    [("sequence", {"pool": "sum"}), ("prompt", {"pool": None}), ("task", {"default": -1})]
    + [("cluster", {"default": value}) for value in (True, 1.0)],
)
def test_a_bad_option_names_its_key(name, options):
    with pytest.raises(ConfigError, match=rf"router_input_kwargs\['{next(iter(options))}'\]"):
        INPUTS[name](**options)
