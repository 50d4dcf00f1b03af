"""A decision about a sequence is that of its prompt, in whatever way the answer is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapted_llama import NEEDS, adapted_llama, cache_of, sentences
from peft import PeftModel
from tiny import tiny_llama
from transformers import GenerationConfig

from moelora_plugin import routing_ids
from moelora_plugin.errors import ConfigError

# Inputs and sites whose decision is about a sequence; the last decides about tokens.
PARTS = {
    "sequence": {"router_input": "sequence"},
    "prompt": {"router_input": "prompt"},
    "layer": {"router_input": "prompt", "site": "layer", "top_k": 1},
    "pools": {"router_input": "sequence", "expert": "pools"},
    "token": {},
    "capacity": {"router_modifiers": {"capacity": {"factor": 0.75}}},
    "expert_choice": {"router": "expert_choice", "router_kwargs": {"capacity_factor": 1.5}},
}
WHOLE = [part for part in PARTS if part != "token"]
POOLED = [part for part in WHOLE if part not in ("capacity", "expert_choice")]
NEW = 6
OPTIONS = {
    "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False,
    "output_logits": True, "return_dict_in_generate": True,
}  # fmt: skip
# fp64 inside, logits in fp32: some hundred roundings of the former, one of the latter.
NEAR = {"rtol": 1e-6, "atol": 1e-6}
# PEFT asks a model of transformers 5.23 by a name that it has given up.
pytestmark = pytest.mark.filterwarnings("ignore:Passing .generation_config. together")


def model_with(part: str, seed: int = 0) -> PeftModel:
    keys = {"router": "topk", **NEEDS.get(PARTS[part].get("router_input", ""), {}), **PARTS[part]}
    if part == "layer":
        del keys["router"]
        return adapted_llama(
            seed, num_experts=2, target_modules=["q_proj", "up_proj"], **keys
        ).double()
    return adapted_llama(seed, **keys).double()


def prompt(rows: int = 1) -> torch.Tensor:
    """The second half repeats the first, so that a lookup finds candidates."""
    half = sentences(rows, 6)
    return torch.cat([half, half], 1)


def generated(model: PeftModel, ids: torch.Tensor, **options: Any) -> tuple[Any, torch.Tensor]:
    out = model.generate(input_ids=ids, **{**OPTIONS, **options})
    return out.sequences, torch.stack(out.logits, 1)


MODES: dict[str, Any] = {
    "no_cache": {"use_cache": False},
    "lookup": {"prompt_lookup_num_tokens": 4},
    "assistant": "assistant",
    "plain_assistant": "plain_assistant",
    "static": {"cache_implementation": "static"},
    "one_chunk": {"prefill_chunk_size": 64},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part", PARTS)
def test_every_way_gives_what_greedy_gives(part: str, mode: str) -> None:
    model, ids = model_with(part), prompt()
    options = MODES[mode]
    if mode == "assistant":
        options = {"assistant_model": model_with(part)}
    elif mode == "plain_assistant":
        options = {"assistant_model": tiny_llama().double()}
    tokens, logits = generated(model, ids)
    found, found_logits = generated(model, ids, **options)
    assert torch.equal(found, tokens)
    torch.testing.assert_close(found_logits, logits, **NEAR)


@pytest.mark.parametrize("part", WHOLE)
def test_without_a_cache_a_padded_batch_keeps_its_decisions(part: str) -> None:
    """Each step sees prompt and answer; the answer has no say."""
    model, ids = model_with(part), sentences(3, 7)
    ids[0, :3] = ids[1, :1] = 2
    mask = (ids != 2).long()
    cached = generated(model, ids, attention_mask=mask)
    again = generated(model, ids, attention_mask=mask, use_cache=False)
    assert torch.equal(cached[0], again[0])
    torch.testing.assert_close(cached[1], again[1], **NEAR)


@pytest.mark.parametrize("part", WHOLE)
def test_several_answers_and_beams_share_their_prompt_s_decision(part: str) -> None:
    model, ids = model_with(part), prompt(2)
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_logits": False}
    cached = model.generate(input_ids=ids, **{**OPTIONS, **beams}).sequences
    without = model.generate(input_ids=ids, **{**OPTIONS, **beams, "use_cache": False}).sequences
    assert torch.equal(cached, without)


@pytest.mark.parametrize("part", WHOLE)
@pytest.mark.parametrize("chunk", [1, 5])
def test_a_prompt_in_chunks_is_refused(part: str, chunk: int) -> None:
    with pytest.raises(ConfigError, match="prefill_chunk_size"):
        generated(model_with(part), prompt(), prefill_chunk_size=chunk)


def test_tokens_do_not_mind_chunks() -> None:
    model, ids = model_with("token"), prompt()
    tokens, logits = generated(model, ids)
    found, found_logits = generated(model, ids, prefill_chunk_size=5)
    assert torch.equal(found, tokens)
    torch.testing.assert_close(found_logits, logits, **NEAR)


@pytest.mark.parametrize("part", WHOLE)
def test_a_generation_that_goes_on_from_a_cache_is_refused(part: str) -> None:
    """The decision that is kept with it is not that of the whole conversation."""
    model, ids = model_with(part), prompt()
    with torch.no_grad():
        cache = cache_of(model(input_ids=ids[:, :5], use_cache=True))
    with pytest.raises(ConfigError, match="without that cache"):
        generated(model, ids, **cache)
    tokens, _ = generated(model, ids)  # and the refusal has left nothing behind
    assert tokens.shape == (1, ids.shape[1] + NEW)


@pytest.mark.parametrize("part", POOLED)
def test_a_cache_that_was_cut_into_the_prompt_is_refused(part: str) -> None:
    model, ids = model_with(part), prompt()
    with torch.no_grad():
        for dropped in (0, len(ids[0]) - 4, len(ids[0])):
            cache = cache_of(model(input_ids=ids, use_cache=True))
            (held,) = cache.values()
            held.crop(-dropped)
            if held.get_seq_length() == 4:
                with pytest.raises(ConfigError, match=f"by {len(ids[0])} tokens"):
                    model(input_ids=ids[:, 4:6], **cache)
            else:  # what was decided by is still there, or nothing is
                model(input_ids=ids[:, :2], **cache)


@pytest.mark.parametrize("part", POOLED)
@pytest.mark.parametrize("name", ["cache", "past_key_values", "memory_of_mine"])
def test_a_cache_is_known_by_what_it_can_do(part: str, name: str) -> None:
    """Its argument's name changes from release to release, its output's as well."""
    model, ids = model_with(part), prompt()
    base = model.get_base_model()
    inner = base.model
    own = "cache" if "cache" in inner.forward.__wrapped__.__annotations__ else "past_key_values"
    forward = base.forward

    def renamed(*args: Any, **kwargs: Any) -> dict[str, Any]:
        if name in kwargs:
            kwargs[own] = kwargs.pop(name)
        output = forward(*args, **kwargs)
        return {name if k in ("cache", "past_key_values") else k: v for k, v in output.items()}

    with torch.no_grad():
        expected = model(input_ids=ids[:, :1], **cache_of(model(input_ids=ids, use_cache=True)))
        base.forward = renamed
        begun = model(input_ids=ids, use_cache=True)
        found = model(input_ids=ids[:, :1], **{name: begun[name]})
    assert torch.equal(found["logits"], expected.logits)


@pytest.mark.parametrize("part", POOLED)
def test_a_step_whose_past_is_nowhere_to_be_seen_is_refused(part: str) -> None:
    model, ids = model_with(part), prompt(2)
    positions = torch.full((2, 1), 12)
    with pytest.raises(ConfigError, match="use_cache=False"), torch.no_grad():
        model(input_ids=ids[:, :1], position_ids=positions, use_cache=False)
    with torch.no_grad():  # a prompt of one token
        model(input_ids=ids[:, :1], position_ids=positions * 0, use_cache=False)


@pytest.mark.parametrize("part", ["sequence", "prompt"])
def test_a_head_that_sees_the_last_token_only_decides_about_no_prompt(part: str) -> None:
    """In training it sees all of them, in a generation one."""
    model, ids = adapted_llama(target_modules=["lm_head"], **PARTS[part]), prompt()
    with torch.no_grad():
        model(input_ids=ids)
    with pytest.raises(ConfigError, match="exclude_modules"):
        generated(model, ids)


# Continuous batching


CONTINUOUS = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=2)


MIXING = {
    "sequence": PARTS["sequence"],
    "prompt": PARTS["prompt"],
    "capacity": {"router_modifiers": {"capacity": 2}},
    "expert_choice": {"router": "expert_choice"},
}


@pytest.mark.parametrize("keys", MIXING.values(), ids=MIXING)
def test_continuous_batching_is_refused_where_a_caller_sees_it(keys: dict[str, Any]) -> None:
    model = adapted_llama(**keys)
    with pytest.raises(ConfigError, match="generate_batch"):
        model.generate_batch(inputs=[[5, 6, 7]], generation_config=CONTINUOUS)
    with pytest.raises(ConfigError, match="generate_batch"):
        model.get_base_model().init_continuous_batching(generation_config=CONTINUOUS)


def test_continuous_batching_takes_one_id_for_all() -> None:
    model = adapted_llama(router_input="task", router_score="embedding")
    with (
        pytest.raises(ConfigError, match="one integer for all"),
        routing_ids(model, task_id=[0, 1]),
    ):
        model.generate_batch(inputs=[[5, 6, 7]], generation_config=CONTINUOUS)
