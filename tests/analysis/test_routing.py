"""Which experts a model uses, against counts made by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import tiny_llama
from torch import Tensor, nn

from moelora_plugin import MoeLoraConfig
from moelora_plugin.analysis import RoutingStatistics, routing_statistics
from moelora_plugin.model import moelora_layers

# Gates are computed in float32: one rounding each.
TOLERANCE = 1e-6

# Logits x W^T with these rows are (x_0, x_1, 0), so the probabilities are (e^x_0, e^x_1, 1) / sum.
ROUTER = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
TOKENS = torch.tensor([[4.0, 2.0], [2.0, 8.0], [0.5, 4.0]]).log()
PROBS = torch.tensor([[4.0, 2.0, 1.0], [2.0, 8.0, 1.0], [0.5, 4.0, 1.0]])
PROBS /= PROBS.sum(-1, keepdim=True)
# The two largest of each row are kept: 2/3 and 1/3; 1/5 and 4/5; 4/5 and 1/5.
LOAD = [2 / 6, 3 / 6, 1 / 6]
WEIGHT = [(2 / 3 + 1 / 5) / 3, (1 / 3 + 4 / 5 + 4 / 5) / 3, (1 / 5) / 3]
ENTROPY = float(-(PROBS * PROBS.log()).sum() / 3)


class Toy(nn.Module):
    """One linear over the tokens, and one over other tokens, as a vision tower has."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(2, 3)
        self.vision = nn.Linear(2, 3)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        pixels: Tensor | None = None,
        fail: bool = False,
        skip: bool = False,
    ) -> Tensor:
        output = inputs_embeds if skip else self.text(inputs_embeds)
        if pixels is not None:
            self.vision(pixels)
        if fail:
            raise RuntimeError("failed on purpose")
        return output


@pytest.fixture
def toy() -> PeftModel:
    config = MoeLoraConfig(r=1, num_experts=3, top_k=2, target_modules=["text", "vision"])
    model = get_peft_model(Toy(), config)
    for layer in moelora_layers(model).values():
        layer.router_weights().copy_(ROUTER)
    return model


def llama(**changes: Any) -> PeftModel:
    settings = {"r": 2, "num_experts": 4, "top_k": 2, "target_modules": ["q_proj", "down_proj"]}
    return get_peft_model(tiny_llama(), MoeLoraConfig(**{**settings, **changes}))


def only(statistics: RoutingStatistics, name: str = "text") -> dict[str, Any]:
    (layer,) = (v for k, v in statistics.to_dict().items() if k.endswith(name))
    return layer


def assert_counted_by_hand(layer: dict[str, Any], tokens: int = 3) -> None:
    assert layer["tokens"] == tokens
    assert layer["load"] == pytest.approx(LOAD, abs=TOLERANCE)
    assert layer["weight"] == pytest.approx(WEIGHT, abs=TOLERANCE)
    assert layer["entropy"] == pytest.approx(ENTROPY, abs=TOLERANCE)


def test_counts_by_hand(toy: PeftModel) -> None:
    with routing_statistics(toy) as statistics:
        toy(TOKENS[None])
        assert_counted_by_hand(only(statistics))
        assert all(layer.last_routing == {} for layer in moelora_layers(toy).values())
        toy(TOKENS[None, :2])
        toy(TOKENS[None, 2:])
    assert_counted_by_hand(only(statistics), tokens=6)
    assert only(statistics)["not_finite"] == 0
    assert json.loads(json.dumps(statistics.to_dict())) == statistics.to_dict()


def test_uniform_gates_have_the_entropy_of_all_experts() -> None:
    model = llama(num_experts=5, top_k=5)
    for layer in moelora_layers(model).values():
        layer.router_weights().zero_()
    with routing_statistics(model) as statistics:
        model(input_ids=torch.tensor([[3, 4, 5]]))
    for counted in statistics.to_dict().values():
        assert counted["entropy"] == pytest.approx(math.log(5), abs=TOLERANCE)
        assert counted["load"] == pytest.approx([0.2] * 5, abs=TOLERANCE)
        assert counted["weight"] == pytest.approx([0.2] * 5, abs=TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["by name", "by position", "without PEFT"])
def test_padding_is_left_out(toy: PeftModel, side: str, how: str) -> None:
    padding = torch.full((1, 2), 9.0)
    first = [padding, TOKENS[:2]] if side == "left" else [TOKENS[:2], padding]
    second = [padding, padding, TOKENS[2:]] if side == "left" else [TOKENS[2:], padding, padding]
    batch = torch.stack([torch.cat(first), torch.cat(second)])
    mask = (batch[..., 0] != 9.0).long()
    model = toy.get_base_model() if how == "without PEFT" else toy
    with routing_statistics(model) as statistics:
        if how == "by name":
            model(inputs_embeds=batch, attention_mask=mask)
        else:
            model(batch, mask)
    assert_counted_by_hand(only(statistics))


def test_a_mask_that_covers_the_past_ends_with_the_current_tokens(toy: PeftModel) -> None:
    batch = torch.cat([TOKENS, torch.full((1, 2), 9.0)])[None]
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 0]])
    with routing_statistics(toy) as statistics:
        toy(inputs_embeds=batch, attention_mask=mask)
    assert_counted_by_hand(only(statistics))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_a_language_model_is_left_out(side: str) -> None:
    model = llama()
    prompts = [[0, 7, 8, 9, 10], [0, 11, 12]]
    with routing_statistics(model) as expected:
        for prompt in prompts:
            model(input_ids=torch.tensor([prompt]))
    padded = [[2] * (5 - len(p)) + p if side == "left" else p + [2] * (5 - len(p)) for p in prompts]
    ids = torch.tensor(padded)
    with routing_statistics(model) as statistics:
        model(input_ids=ids, attention_mask=(ids != 2).long())
    assert_equal(statistics, expected, tokens=8)


def test_generation_with_a_cache_counts_every_token_once() -> None:
    model = llama()
    ids = torch.tensor([[0, 7, 8, 9, 10], [2, 2, 0, 11, 12]])
    mask = (ids != 2).long()
    with routing_statistics(model) as statistics:
        generated = model.generate(
            input_ids=ids, attention_mask=mask, min_new_tokens=4, max_new_tokens=4, do_sample=False
        )
    # The last token generated is never fed back.
    fed = generated[:, :-1]
    mask = torch.cat([mask, torch.ones(2, 3, dtype=mask.dtype)], dim=1)
    with routing_statistics(model) as expected:
        model(input_ids=fed, attention_mask=mask)
    assert_equal(statistics, expected, tokens=8 + 2 * 3)


def assert_equal(one: RoutingStatistics, other: RoutingStatistics, tokens: int) -> None:
    assert list(one.layers) == list(other.layers)
    for name, layer in one.to_dict().items():
        expected = other.to_dict()[name]
        assert layer["tokens"] == expected["tokens"] == tokens
        assert layer["load"] == expected["load"]
        # Attention over padding, or one token at a time, rounds differently (float32, two layers).
        assert layer["weight"] == pytest.approx(expected["weight"], abs=1e-5)
        assert layer["entropy"] == pytest.approx(expected["entropy"], abs=1e-5)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_are_not_counted_again(reentrant: bool) -> None:
    model = llama()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    ids = torch.tensor([[0, 7, 8, 9, 10]])
    with routing_statistics(model) as statistics:
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
    assert {layer["tokens"] for layer in statistics.to_dict().values()} == {10}


def test_tokens_without_finite_gates_are_counted_apart(toy: PeftModel) -> None:
    broken = torch.tensor([[float("nan"), 0.0], [float("inf"), 0.0]])
    with routing_statistics(toy) as statistics:
        toy(broken[None])
        assert only(statistics)["tokens"] == 0
        toy(torch.cat([broken[:1], TOKENS, broken[1:]])[None])
    assert_counted_by_hand(only(statistics))
    assert only(statistics)["not_finite"] == 4


def test_layers_that_see_other_tokens_are_not_masked(toy: PeftModel) -> None:
    """As in LLaVA: the images' patches outnumber the text, or are fewer, or fill the same batch."""
    batch = torch.stack([TOKENS, torch.full_like(TOKENS, 9.0)])
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    for patches in (1, 2, 7):
        pixels = torch.zeros(2, patches, 2)
        with routing_statistics(toy) as statistics:
            toy(inputs_embeds=batch, attention_mask=mask, pixels=pixels)
        assert_counted_by_hand(only(statistics))
        assert only(statistics, "vision")["tokens"] == 2 * patches


def test_a_mask_of_another_shape_is_no_mask(toy: PeftModel) -> None:
    with routing_statistics(toy) as statistics:
        toy(inputs_embeds=TOKENS[None], attention_mask=torch.zeros(1, 1, 3, 3))
    assert_counted_by_hand(only(statistics))


def test_a_forward_that_failed_is_not_counted_later(toy: PeftModel) -> None:
    with routing_statistics(toy) as statistics:
        with pytest.raises(RuntimeError, match="on purpose"):
            toy(TOKENS[None], fail=True)
        toy(TOKENS[None], skip=True)
    assert statistics.to_dict() == {}


def test_nothing_is_recorded_or_kept_afterwards(toy: PeftModel) -> None:
    toy(TOKENS[None])
    assert_nothing_left(toy)
    with routing_statistics(toy) as statistics:
        toy(TOKENS[None])
    before = statistics.to_dict()
    toy(TOKENS[None])
    assert_nothing_left(toy)
    assert statistics.to_dict() == before


def test_an_error_in_the_block_cleans_up(toy: PeftModel) -> None:
    with pytest.raises(RuntimeError, match="on purpose"), routing_statistics(toy):
        toy(TOKENS[None], fail=True)
    assert_nothing_left(toy)


def assert_nothing_left(model: PeftModel) -> None:
    base = model.get_base_model()
    # One of each tells the layers about the call; another waits for the first training step.
    assert [type(h.__self__).__name__ for h in base._forward_hooks.values()] == [
        "CallContext",
        "FirstStep",
    ]
    assert len(base._forward_pre_hooks) == 1
    for layer in moelora_layers(model).values():
        assert not layer.record_routing
        assert layer.last_routing == {}


def test_only_the_adapter_that_was_asked_for_is_counted(toy: PeftModel) -> None:
    with routing_statistics(toy, adapter="other") as statistics:
        toy(TOKENS[None])
    assert statistics.to_dict() == {}
    with routing_statistics(toy) as statistics, toy.disable_adapter():
        toy(TOKENS[None])
    assert statistics.to_dict() == {}
