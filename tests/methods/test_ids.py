"""What the adapted layers learn of the model's call, and how ids reach them."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapted_llama import adapted_llama, cache_of, sentences
from peft import get_peft_model
from task_rows import write_data
from tiny import tiny_llama, tiny_tokenizer
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from moelora_plugin import MoeLoraConfig, routing_ids
from moelora_plugin.call import Call, CallContext, read_call
from moelora_plugin.checkpoint import load_adapter
from moelora_plugin.clusters import EmbeddingFeatures, fit_clusters, read_prompts
from moelora_plugin.errors import ConfigError, ExportError
from moelora_plugin.evaluation import EvaluationRequest, evaluate, evaluate_model
from moelora_plugin.model import find_tuner, moelora_layers
from moelora_plugin.schema import from_mapping
from moelora_plugin.training import train
from moelora_plugin.training.data import load_data
from moelora_plugin.training.examples import AnswerCollator
from moelora_plugin.training.recipe import Recipe

TASK = {"router_input": "task", "router_score": "embedding"}
TASK_IDS = torch.tensor([1, 0, 2])


def context_of(model: nn.Module) -> CallContext:
    tuner = find_tuner(model)
    assert tuner is not None
    return tuner.shared.call


def calls_seen(model: nn.Module) -> list[Call]:
    """The calls that the first adapted layer saw itself in, from now on."""
    seen: list[Call] = []
    layer = next(iter(moelora_layers(model).values()))
    layer.register_forward_pre_hook(lambda *_: seen.append(context_of(model).call))
    return seen


def read(model: Any = None, *args: Any, ids: dict | None = None, **kwargs: Any) -> Call:
    return read_call(model or nn.Identity(), args, kwargs, ids or {})


def cache(length: Any) -> SimpleNamespace:
    return SimpleNamespace(get_seq_length=lambda: length)


# Reading a call


def test_padding_and_prompt_are_read_by_hand():
    ids = torch.tensor([[5, 6, 7, 2], [5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    labels = torch.tensor([[-100, 6, 7, -100], [-100, -100, -100, 8]])
    call = read(input_ids=ids, attention_mask=mask, labels=labels)
    assert call.shape == (2, 4)
    assert torch.equal(call.real_BS, mask.bool())
    assert call.prompt_BS.tolist() == [[True, False, False, False], [True, True, True, False]]
    assert call.begins


def test_a_prompt_ends_at_the_first_label_of_a_conversation():
    """What a user says after the first answer is no part of the prompt that decides."""
    labels = torch.tensor([[-100, -100, 6, -100, -100, 7]])
    call = read(input_ids=labels, labels=labels)
    assert call.prompt_BS.tolist() == [[True, True, False, False, False, False]]


def test_a_label_per_sequence_makes_everything_the_prompt():
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [1, 1, 1]])
    call = read(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1]))
    assert torch.equal(call.prompt_BS, mask.bool())


def test_positional_arguments_are_found_by_the_model_s_names():
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [1, 1, 1]])
    by_position = read(tiny_llama(), ids, mask)
    assert by_position.shape == (2, 3)
    assert torch.equal(by_position.real_BS, mask.bool())
    embeds = read(inputs_embeds=torch.zeros(2, 3, 8))
    assert embeds.shape == (2, 3)


def test_with_a_cache_the_mask_s_last_columns_count():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    for name in ("past_key_values", "cache", "another"):
        call = read(input_ids=mask[:, :1], attention_mask=mask, **{name: cache(3)})
        assert call.real_BS.tolist() == [[True], [False]]
        assert not call.begins


def test_a_mask_that_is_too_short_says_nothing():
    assert read(input_ids=torch.ones(1, 4), attention_mask=torch.ones(1, 3)).real_BS is None
    # What a host adds to the scores is padding only where a position may not see itself.
    assert read(input_ids=torch.ones(1, 4), attention_mask=torch.ones(1, 1, 4, 4)).real_BS.all()


def test_a_cache_s_own_counter_may_move_on():
    counter = torch.tensor(0)
    call = read(input_ids=torch.ones(1, 4), past_key_values=cache(counter))
    counter += 4
    assert call.begins


def test_a_cache_that_does_not_tell_is_no_beginning():
    for name in ("past_key_values", "cache", "cache_params"):
        assert read(input_ids=torch.ones(1, 4), **{name: (1, 2)}).begins is None


def test_a_cache_without_attention_knows_whether_it_has_begun():
    """Layers of linear attention do not count, and say so by an error."""

    def uncounted() -> int:
        raise ValueError("only linear attention")

    for begun in (True, False):
        held = SimpleNamespace(get_seq_length=uncounted, has_previous_state=lambda b=begun: b)
        call = read(input_ids=torch.ones(1, 4), cache_params=held)
        assert call.begins is not begun
        assert call.held is None


def test_some_sequences_of_a_call_are_a_call_of_their_own():
    """For a layer that gets the rows of one adapter of several."""
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 0]])
    labels = torch.tensor([[-100, -100, 5], [-100, 6, 7], [-100, 5, -100]])
    ids = {"task_id": torch.tensor([3, 4, 5]), "cluster_id": torch.tensor(7)}
    call = read(input_ids=mask, attention_mask=mask, labels=labels, ids=ids)
    some = call.rows([2, 0])
    assert some.shape == (2, 3)
    assert some.real_BS.tolist() == [[True, True, False], [False, True, True]]
    assert some.prompt_BS.tolist() == [[True, False, False], [False, True, False]]
    assert some.ids["task_id"].tolist() == [5, 3]
    assert some.ids["cluster_id"].tolist() == 7
    assert (some.past, some.is_training) == (call.past, call.is_training)
    # Layers know by the object that they are in one call; what is kept lives on in the next one.
    assert call.rows(range(2, -1, -2)) is some is not call.rows([0, 2])
    assert some.kept is call.kept
    assert some.rows([1]).real_BS.tolist() == [[False, True, True]]


def test_some_sequences_of_a_call_that_says_nothing():
    some = read().rows([1])
    assert (some.shape, some.real_BS, some.prompt_BS, some.ids) == (None, None, None, {})


# Ids


def test_ids_of_a_call_reach_the_layers_and_not_the_model():
    model = adapted_llama(**TASK)
    seen = calls_seen(model)
    model(input_ids=sentences(), task_id=TASK_IDS, cluster_id=5)
    assert seen[0].ids["task_id"].tolist() == [1, 0, 2]
    assert seen[0].ids["cluster_id"].tolist() == 5


def test_each_task_has_gates_of_its_own():
    model, ids = adapted_llama(**TASK), sentences()
    together = model(input_ids=ids, task_id=TASK_IDS).logits
    for row, task in enumerate(TASK_IDS):
        alone = model(input_ids=ids[row : row + 1], task_id=[int(task)]).logits[0]
        # Three rows or one take other kernels: some hundred roundings of fp32.
        torch.testing.assert_close(alone, together[row], rtol=1e-3, atol=1e-4)
    other = model(input_ids=ids, task_id=TASK_IDS.flip(0)).logits
    assert not torch.equal(other[0], together[0])


@pytest.mark.parametrize("ids", [TASK_IDS, TASK_IDS.tolist(), TASK_IDS.int()], ids=str)
def test_routing_ids_are_those_of_a_call_without(ids):
    model, tokens = adapted_llama(**TASK), sentences()
    expected = model(input_ids=tokens, task_id=TASK_IDS).logits
    with routing_ids(model, task_id=ids):
        assert torch.equal(model(input_ids=tokens).logits, expected)
        with routing_ids(model, task_id=0):
            assert torch.equal(model(input_ids=tokens, task_id=TASK_IDS).logits, expected)
            assert not torch.equal(model(input_ids=tokens).logits, expected)
        assert torch.equal(model(input_ids=tokens).logits, expected)
    with pytest.raises(ConfigError, match="task_id"):
        model(input_ids=tokens)


def test_routing_ids_end_with_an_exception():
    model = adapted_llama(**TASK)
    with pytest.raises(ZeroDivisionError), routing_ids(model, task_id=1):
        raise ZeroDivisionError
    assert context_of(model).ids == {}


def test_wrapped_models_and_bare_bases_take_routing_ids():
    model, tokens = adapted_llama(**TASK), sentences()
    expected = model(input_ids=tokens, task_id=1).logits
    for outside in (nn.ModuleList([model]), model.get_base_model()):
        with routing_ids(outside, task_id=1):
            assert torch.equal(model(input_ids=tokens).logits, expected)


@pytest.mark.parametrize("bad", [1.0, True, [[1]], torch.tensor([0.5])], ids=str)
def test_what_is_no_id_is_refused(bad):
    model = adapted_llama(**TASK)
    with (
        pytest.raises(ConfigError, match="task_id must be one integer"),
        routing_ids(model, task_id=bad),
    ):
        pass
    with pytest.raises(ConfigError, match="task_id must be one integer"):
        model(input_ids=sentences(), task_id=bad)


def test_a_wrong_number_of_ids_is_refused():
    model = adapted_llama(**TASK)
    with pytest.raises(ConfigError, match="task_id has 2 ids for 3 sequences"):
        model(input_ids=sentences(), task_id=[0, 1])
    # A call's own ids are one per row: chosen and rejected answers may follow each other.
    with pytest.raises(ConfigError, match="task_id has 3 ids for 6 sequences"):
        model(input_ids=sentences(6), task_id=TASK_IDS)
    with routing_ids(model, task_id=[0, 1]), pytest.raises(ConfigError, match="2 ids for 3"):
        model(input_ids=sentences())


def test_a_model_without_our_layers_is_refused():
    with (
        pytest.raises(ConfigError, match="LlamaForCausalLM has none"),
        routing_ids(tiny_llama(), task_id=0),
    ):
        pass


def test_an_adapter_without_ids_ignores_them():
    model, tokens = adapted_llama(), sentences()
    expected = model(input_ids=tokens).logits
    assert torch.equal(model(input_ids=tokens, task_id=TASK_IDS).logits, expected)


def test_a_merge_is_exact_for_the_one_task_that_is_set():
    model, tokens = adapted_llama(**TASK), sentences()
    with pytest.raises(ExportError):
        model.merge_adapter()
    expected = model(input_ids=tokens, task_id=2).logits
    with routing_ids(model, task_id=2):
        model.merge_adapter()
    # W + B A in one product instead of two: fp32 rounds each of a hundred terms of size 10.
    near = {"rtol": 1e-3, "atol": 2e-3}
    torch.testing.assert_close(model(input_ids=tokens).logits, expected, **near)
    with routing_ids(model, task_id=0):
        model.unmerge_adapter()  # takes out what was put in
    torch.testing.assert_close(model(input_ids=tokens, task_id=2).logits, expected, **near)


def test_a_default_merges_without_being_told():
    model = adapted_llama(**TASK, router_input_kwargs={"default": 1})
    expected = model(input_ids=sentences(), task_id=1).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=sentences()).logits, expected, rtol=1e-3, atol=2e-3)


# The context


def test_a_call_ends_with_the_model_s_forward_even_if_that_fails():
    model = adapted_llama(**TASK)
    for bad in (
        {"input_ids": sentences(), "attention_mask": "no mask"},
        {"input_ids": sentences()},
    ):
        with pytest.raises((ConfigError, AttributeError, TypeError)):
            model(**bad)
        assert context_of(model)._calls == []
    model(input_ids=sentences(), task_id=0)


def test_a_call_inside_a_call_leaves_the_outer_one_going_on():
    model = adapted_llama()
    seen = []
    inner = [sentences(5, 4)]

    def again(*_: Any) -> None:
        seen.append(context_of(model).call.shape)
        if inner:
            model(input_ids=inner.pop())
            seen.append(context_of(model).call.shape)

    next(iter(moelora_layers(model).values())).register_forward_pre_hook(again)
    model(input_ids=sentences(3, 7))
    assert seen == [(3, 7), (5, 4), (3, 7)]


def test_a_layer_called_by_itself_knows_no_call():
    """Not even the last one's padding."""
    model = adapted_llama().train()
    model(input_ids=sentences(), attention_mask=torch.ones(3, 7))
    assert context_of(model).call.real_BS is None
    model.get_base_model().model(
        input_ids=sentences(2, 3)
    )  # the inner model, as some hosts call it


def test_state_changes_before_training_calls_only():
    model = adapted_llama()
    seen: list[Call] = []
    context_of(model).before_call.append(seen.append)
    model(input_ids=sentences())
    with torch.no_grad():
        model.train()(input_ids=sentences())
    assert seen == []
    model(input_ids=sentences())
    assert [call.is_training for call in seen] == [True]


def test_copies_know_their_own_calls_only():
    model = adapted_llama(**TASK)
    with routing_ids(model, task_id=1):
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert context_of(other) is not context_of(model)
            seen = calls_seen(other)
            other(input_ids=sentences(2, 5))
            assert seen[0].shape == (2, 5)
            assert seen[0].ids["task_id"].tolist() == 1
            assert context_of(model).call.shape is None


def test_two_adapters_are_told_once():
    model = adapted_llama(**TASK)
    model.add_adapter("other", replace(model.peft_config["default"]))
    seen = calls_seen(model)
    model(input_ids=sentences(), task_id=TASK_IDS)
    assert len(seen) == 1


def test_a_graph_and_a_cache_take_what_was_kept_of_them_along():
    model = adapted_llama(router_input="prompt").train()
    ids, seen = sentences(), calls_seen(model)
    loss = model(input_ids=ids, labels=ids).loss
    first = weakref.ref(seen.pop())
    model(input_ids=ids, labels=ids)
    assert first() is not None  # the backward may still come
    with torch.no_grad():
        past = cache_of(model.eval()(input_ids=ids, use_cache=True))
    kept = context_of(model)._kept
    assert len(kept) == 1
    del loss, past
    gc.collect()
    assert (len(kept), first()) == (0, None)


# torch's own: it makes an instance to trace a custom Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["task", "prompt"])
def test_the_whole_model_is_one_graph(name):
    score = {"router_score": "embedding"} if name == "task" else {}
    model = adapted_llama(router_input=name, target_modules=["q_proj"], layers=1, **score).train()
    ids = sentences()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    found = compiled(**batch, task_id=TASK_IDS).loss
    assert torch.equal(found, model(**batch, task_id=TASK_IDS).loss)
    assert context_of(model)._calls == []


def test_generate_needs_routing_ids():
    model = adapted_llama(**TASK)
    with pytest.raises(ValueError, match="task_id"):
        model.generate(input_ids=sentences(), task_id=0)
    with routing_ids(model, task_id=TASK_IDS):
        assert model.generate(input_ids=sentences(), max_new_tokens=2).shape == (3, 9)


# Hosts and our own training


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = sentences(1, 5, seed=index)[0]
        return {"input_ids": ids, "labels": ids, "task_id": index % 3}


def test_transformers_trainer_brings_ids_where_it_keeps_the_column(tmp_path: Path):
    """And tasks that are trained apart come out different."""
    model = get_peft_model(
        tiny_llama(),
        MoeLoraConfig(**TASK, target_modules=["q_proj"], r=2, num_experts=3, top_k=1),
    )
    seen = calls_seen(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=3,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    Trainer(model=model, args=arguments, train_dataset=Rows()).train()
    assert all(len(call.ids["task_id"]) == 3 for call in seen)


def test_a_classifier_s_input_is_all_prompt():
    base = BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )
    model = get_peft_model(
        base,
        MoeLoraConfig(
            router_input="prompt",
            target_modules=["query", "value"],
            num_experts=2,
            top_k=1,
            task_type="SEQ_CLS",
        ),
    )
    ids = torch.arange(3, 15).view(2, 6)
    model.train()(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()


SETTINGS = {"max_steps": 2, "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 4}


def recipe_for(tmp_path: Path, adapter: dict[str, Any], tasks: Any, **data: Any) -> Recipe:
    base = tmp_path / "base"
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    return from_mapping(
        Recipe,
        {
            "model": {"name": str(base)},
            "adapter": {"num_experts": 2, "top_k": 1, "r": 1, "router": "softmax", **adapter},
            "optimizer": {"name": "gradamw", "lr": 1e-2, "gate_lr": 1e-2},
            "data": {"tasks": tasks, "data_dir": str(write_data(tmp_path / "data")), **data},
            "training": SETTINGS,
            "output_dir": str(tmp_path / "run"),
        },
    )


def test_recipes_train_and_evaluate_by_task(tmp_path: Path):
    """In a run's batches each row has its task's id; an evaluation sets each task's own."""
    recipe = recipe_for(
        tmp_path,
        {**TASK, "router_score_kwargs": {"num_ids": 2, "width": None}},
        {"rte": 1.0, "stsb": 1.0},
    )
    result = train(recipe)
    request = EvaluationRequest(
        tasks=("stsb", "rte"),
        adapters=(str(result.adapter_dir),),
        data_dir=recipe.data.data_dir,
        device="cpu",
        output=tmp_path / "eval.json",
    )
    scored = evaluate(request)
    model, tokenizer = load_adapter(result.adapter_dir, device="cpu")
    for name, task_id in {"rte": 0, "stsb": 1}.items():
        with routing_ids(model, task_id=task_id):
            alone = evaluate_model(model, tokenizer, [name], data_dir=recipe.data.data_dir)
        assert alone.tasks[name].metrics["model"] == scored.tasks[name].metrics["adapter"]
        by_name = evaluate_model(
            model,
            tokenizer,
            [name],
            data_dir=recipe.data.data_dir,
            task_ids={name: task_id},
        )
        assert by_name.tasks[name].metrics == alone.tasks[name].metrics
    with pytest.raises(ConfigError, match="not trained on cola"):
        evaluate(replace(request, tasks=("cola",), output=tmp_path / "other.json"))


def test_examples_know_their_task(tmp_path: Path):
    recipe = recipe_for(tmp_path, TASK, ["stsb", "rte"])
    data = load_data(recipe.data, tiny_tokenizer(), seed=0, validation=True)
    for rows in (data.train, data.validation):
        assert set(rows["task_id"]) == {0, 1}
        text = {task: set() for task in (0, 1)}
        for example in rows:
            text[example["task_id"]].add("rated" in tiny_tokenizer().decode(example["input_ids"]))
        assert text == {0: {True}, 1: {False}}
    examples = [{"input_ids": [3], "labels": [3], "task_id": 1, "cluster_id": 4}] * 2
    batch = AnswerCollator(0)(examples)
    assert (batch["task_id"].tolist(), batch["cluster_id"].tolist()) == ([1, 1], [4, 4])


@pytest.mark.parametrize(
    ("adapter", "data", "key"),
    [
        ({**TASK, "router_score_kwargs": {"num_ids": 1}}, {}, "num_ids"),
        ({**TASK, "router_input": "cluster"}, {}, "data.clusters"),
    ],
)
def test_a_recipe_without_enough_ids_is_refused_before_the_base_is_loaded(
    tmp_path: Path, adapter: dict[str, Any], data: dict[str, Any], key: str
):
    with pytest.raises(ConfigError, match=key):
        train(recipe_for(tmp_path, adapter, ["rte", "stsb"], **data))


def test_a_recipe_trains_by_cluster(tmp_path: Path):
    adapter = {**TASK, "router_input": "cluster"}
    recipe = recipe_for(tmp_path, adapter, ["rte"])
    tokenizer = tiny_tokenizer()
    data = load_data(recipe.data, tokenizer, seed=0, validation=False)
    columns = {name: data.train[name] for name in ("input_ids", "labels")}
    features = EmbeddingFeatures(tiny_llama(vocab_size=len(tokenizer)), 0)
    fit_clusters(read_prompts(columns), features, 2).save(tmp_path / "clusters")
    with_clusters = replace(recipe, data=replace(recipe.data, clusters=str(tmp_path / "clusters")))
    seen: list[Call] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
            context_of(model).before_call.append(seen.append)

    train(with_clusters, callbacks=[Watch()])
    ids = torch.cat([call.ids["cluster_id"] for call in seen])
    assert set(ids.tolist()) == {0, 1}
    few = {**recipe.adapter, "router_score_kwargs": {"num_ids": 1}}
    with pytest.raises(ConfigError, match="num_ids"):
        train(replace(with_clusters, adapter=few), overwrite=True)
    with pytest.raises(ConfigError, match=r"data\.clusters"):
        replace(recipe.data, clusters=str(tmp_path / "nowhere"))
