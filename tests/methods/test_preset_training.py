"""Every preset trains, and keeps the promises that all adapters make."""

from __future__ import annotations

import pytest
import torch
from adapted_llama import checkpoint_activations
from peft import PeftModel
from preset_cases import adapted, base, grown, ids_of, toy_batch
from torch import Tensor, nn

from moelora_plugin import PRESETS, build_optimizer
from moelora_plugin.integrations.init import optimizer_for

MOST_STEPS = 120
SOLVED = 0.4  # nats; a coin between two answers costs 0.69
# What has few parameters, or starts far away, moves in larger steps.
RATES = {"mov": 0.1, "cat": 0.1, "xlora": 0.1, "mole_wu": 0.1, "self_moe": 0.1}
# With the usual rate it hops about the solution, on some processors past the last step.
RATES["milora_prompt"] = 5e-3
# Their experts are given, and the router is made from them.
TRAIN_NOTHING = ("arrow", "genknowsub")
TRAINED = [name for name in PRESETS if name not in TRAIN_NOTHING]


def loss(model: nn.Module, name: str, batch: dict[str, Tensor] | None = None) -> Tensor:
    return model(**(batch or toy_batch()), **ids_of(name)).loss


def logits(model: nn.Module, name: str, **changes: Tensor) -> Tensor:
    batch = {k: v for k, v in toy_batch().items() if k != "labels"}
    with torch.no_grad():
        return model(**{**batch, **ids_of(name), **changes}).logits


def is_solved(model: nn.Module, name: str, first: float) -> bool:
    """Every answer is right, and surely so."""
    now = loss(model, name).item()
    if is_given(name):  # a router alone can do no more than its adapters: most of the loss is gone
        return now < first / 5
    answers = logits(model, name)[:, -2].argmax(-1)
    return torch.equal(answers, toy_batch()["input_ids"][:, -1]) and now < SOLVED


def is_given(name: str) -> bool:
    """Whether its experts are adapters that stay as they are."""
    return PRESETS[name].overrides.get("init") == "adapters"


def gradients(model: nn.Module, name: str, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model.train()
    loss(model, name).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# gr_exact has an exponent that no optimizer's name stands for.
@pytest.mark.filterwarnings("ignore:.* stands for gate_rescale:UserWarning")
@pytest.mark.parametrize("optimizer", ["torch", "ours"])
@pytest.mark.parametrize("name", TRAINED)
def test_it_learns_a_task_that_the_base_cannot_do(name, optimizer):
    model = adapted(name).train()
    rate = RATES.get(name, 1e-2)
    if optimizer == "torch":
        steps = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    else:
        steps = build_optimizer(model, optimizer_for(name), lr=rate, gate_lr=rate)
    first = loss(model.eval(), name).item()
    # The base is sure of other tokens; adapters that are given bring the answers along.
    assert first > (1 if is_given(name) else 10)
    torch.manual_seed(0)
    for step in range(MOST_STEPS):
        if step % 10 == 0 and is_solved(model.eval(), name, first):
            break
        loss(model.train(), name).backward()
        steps.step()
        steps.zero_grad()
    assert is_solved(model.eval(), name, first)


@pytest.mark.parametrize("name", PRESETS)
def test_saved_and_loaded_it_gives_the_same_bits(name, tmp_path):
    model = grown(name).eval()
    expected = logits(model, name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(logits(loaded, name), expected)
    assert not torch.equal(expected, logits(loaded.unload(), name))


@pytest.mark.parametrize("mode", ["none", "sqrt", "exact"])
@pytest.mark.parametrize("name", TRAINED)
def test_any_gate_rescaling_goes_with_it(name, mode):
    """The forward does not see it, the gates' own gradient neither; the experts' changes."""
    model = grown(name, gate_rescale=mode)
    found = gradients(model, name)
    assert all(grad.isfinite().all() for grad in found.values())
    plain = grown(name, gate_rescale="none")
    assert torch.equal(logits(model.eval(), name), logits(plain.eval(), name))


@pytest.mark.parametrize("name", TRAINED)
def test_it_runs_in_bfloat16(name):
    model = grown(name).to(torch.bfloat16)
    assert all(grad.isfinite().all() for grad in gradients(model, name).values())
    assert logits(model.eval(), name).dtype == torch.bfloat16


@pytest.mark.parametrize("name", TRAINED)
def test_activation_checkpointing_changes_nothing(name):
    model = grown(name)
    expected = gradients(model, name)
    again = grown(name)
    checkpoint_activations(again, reentrant=False)
    found = gradients(again, name)
    assert expected.keys() == found.keys()
    for key, grad in expected.items():
        # The same operations on the same numbers; a recomputation may only differ in the order in
        # which gradients of a tensor with several uses are added.
        torch.testing.assert_close(found[key], grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_a_sequence_does_not_depend_on_its_batch(name):
    model = grown(name).double().eval()
    batch, ids = toy_batch(), ids_of(name)
    whole = logits(model, name)
    for row in range(0, len(whole), 3):
        one = {"input_ids": batch["input_ids"][row : row + 1]}
        one["attention_mask"] = torch.ones_like(one["input_ids"])
        alone = logits(model, name, **one, **{k: v[row : row + 1] for k, v in ids.items()})
        # Sums over more rows at a time round differently.
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PRESETS)
def test_padding_has_no_influence(name):
    """Neither that it is there, nor what it holds."""
    model = grown(name).double().eval()
    batch = toy_batch()
    expected = logits(model, name)
    for token in (2, 40):
        padding = torch.full((len(expected), 3), token)
        padded = {
            "input_ids": torch.cat([padding, batch["input_ids"]], 1),
            "attention_mask": torch.cat([0 * padding, batch["attention_mask"]], 1),
            # Without these a Llama counts the padding's positions.
            "position_ids": torch.arange(6).sub(3).clamp(min=0).expand(len(expected), -1),
        }
        found = logits(model, name, **padded)[:, 3:]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)  # another order of sums
