"""What holds for every auxiliary loss, alone and inside a model."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from tiny import enable_checkpointing, tiny_llama
from transformers import Trainer, TrainingArguments

from moelora_plugin import MoeLoraConfig
from moelora_plugin.losses import LOSSES, LossInput
from moelora_plugin.model import moelora_layers
from moelora_plugin.types import Routing

TOKENS, EXPERTS, SEQUENCES, WIDTH = 12, 4, 3, 6

# Losses of parameters alone: what the tokens are does not matter.
OF_PARAMETERS = {"orthogonal"}
# Least, and stationary, where every expert has the same share of every token.
BALANCE = ["switch_lb", "importance_cv2", "load_cv2", "localized_cv2"]


def given(dtype=torch.float64, seed=0):
    """What a layer hands to its losses, as leaves."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"logits": (TOKENS, EXPERTS), "lambda": (TOKENS,), "x": (TOKENS, WIDTH)}
    shapes |= {f"a{i}": (2, WIDTH) for i in range(EXPERTS)}
    shapes |= {f"b{i}": (5, 2) for i in range(EXPERTS)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for name, shape in shapes.items()
    }


def input_of(leaves, real=None, batch=SEQUENCES) -> LossInput:
    logits = leaves["logits"]
    probs = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    kept, ids = probs.topk(2)
    weights = torch.zeros_like(probs).scatter(-1, ids, kept / kept.sum(-1, keepdim=True))
    experts = [(leaves[f"a{i}"], leaves[f"b{i}"]) for i in range(EXPERTS)]

    def outputs(index):
        return torch.stack([leaves["x"][index] @ a.T @ b.T for a, b in experts], 1)

    types = torch.tensor([1, 0, 1]).repeat_interleave(TOKENS // SEQUENCES)
    routing = Routing(logits, probs, weights, ids, {"lambda": leaves["lambda"]})
    return LossInput(routing, real, {"task_id": types}, lambda: experts, outputs, batch)


def padding(*tokens):
    real = torch.ones(TOKENS, dtype=torch.bool)
    real[list(tokens)] = False
    return real


def value_and_gradients(name, leaves, real=None):
    value = LOSSES[name](input_of(leaves, real))
    if value.requires_grad:
        value.backward()
    return value.detach(), {key: leaf.grad for key, leaf in leaves.items()}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_a_scalar_whose_gradient_reaches_router_or_experts(name):
    value, grads = value_and_gradients(name, given())
    assert value.shape == ()
    assert value.isfinite()
    reached = {key for key, grad in grads.items() if grad is not None and grad.any()}
    assert reached
    for key in reached:
        assert grads[key].isfinite().all(), key
    assert reached <= {"logits"} or name in {"lambda_sparsity", "contrastive", "orthogonal"}


@pytest.mark.parametrize("name", LOSSES)
def test_what_padding_holds_does_not_matter(name):
    real = padding(0, 5, 8, 9, 10, 11)  # the last sequence is padding alone
    found = []
    for poison in (0.0, 50.0):
        leaves = given()
        with torch.no_grad():
            for key in ("logits", "lambda", "x"):
                leaves[key][~real] += poison
        value, grads = value_and_gradients(name, leaves, real)
        found.append((value, grads))
        for key in ("logits", "lambda", "x"):
            assert grads[key] is None or not grads[key][~real].any(), key
    (value, grads), (poisoned, poisoned_grads) = found
    # The same numbers; only terms that are multiplied by zero differ.
    torch.testing.assert_close(poisoned, value, rtol=1e-12, atol=1e-12)
    for key, grad in grads.items():
        if grad is not None:
            torch.testing.assert_close(poisoned_grads[key], grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_a_mask_without_padding_is_no_mask(name):
    value, grads = value_and_gradients(name, given())
    masked, masked_grads = value_and_gradients(name, given(), padding())
    torch.testing.assert_close(masked, value, rtol=1e-12, atol=1e-12)  # another order of summation
    for key, grad in grads.items():
        if grad is not None:
            torch.testing.assert_close(masked_grads[key], grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_all_padding_gives_zero_and_no_gradient_but_no_nan(name):
    value, grads = value_and_gradients(name, given(), padding(*range(TOKENS)))
    if name not in OF_PARAMETERS:
        assert value.item() == 0
        assert not any(grad is not None and grad.any() for grad in grads.values())
    assert value.isfinite()
    assert all(grad is None or grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_half_precision_is_computed_in_float32(name):
    half = given(torch.bfloat16)
    same = {key: leaf.detach().float().requires_grad_() for key, leaf in half.items()}
    value, expected = LOSSES[name](input_of(half)), LOSSES[name](input_of(same))
    assert value.dtype == torch.float32
    # What differs is the experts' own product in bfloat16, for the loss that reads outputs.
    close = {"rtol": 0.05, "atol": 0} if name == "contrastive" else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(value, expected, **close)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_deterministic_and_draws_no_random_numbers(name):
    state = torch.get_rng_state()
    first, second = (LOSSES[name](input_of(given())) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", BALANCE)
def test_a_balance_loss_is_least_and_stationary_at_balance(name):
    """Every expert the same share: K for the Switch loss, 0 for those that measure spread."""
    logits = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64, requires_grad=True)

    def loss(logits):
        probs = logits.softmax(-1)
        types = torch.zeros(TOKENS, dtype=torch.long)
        options = {"delta": 0.0} if name == "localized_cv2" else {}
        inputs = LossInput(Routing(logits, probs, probs), None, {"task_id": types}, batch=SEQUENCES)
        return LOSSES[name](inputs, **options)

    balanced = loss(logits)
    balanced.backward()
    expected = EXPERTS if name == "switch_lb" else 0.0
    assert balanced.item() == pytest.approx(expected, abs=1e-12)
    assert logits.grad.abs().max() < 1e-12
    if name == "switch_lb":
        return  # dense gates select everybody, so nothing moves this loss
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        other = torch.randn(TOKENS, EXPERTS, generator=generator, dtype=torch.float64)
        assert loss(other) > balanced


@pytest.mark.parametrize("name", BALANCE)
def test_a_step_against_a_balance_loss_evens_the_experts_out(name):
    logits = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(1))
    logits[:, 0] += 2  # a favourite
    leaf = logits.double().requires_grad_()
    leaves = {**given(), "logits": leaf}
    optimizer = torch.optim.SGD([leaf], lr=3.0)
    spread = []
    for _ in range(20):
        spread.append(leaf.softmax(-1).mean(0).std().item())
        optimizer.zero_grad()
        LOSSES[name](input_of(leaves)).backward()
        optimizer.step()
    assert spread[-1] < spread[0]


# In a model ---------------------------------------------------------------------------------------

EVERYTHING = dict.fromkeys(LOSSES, 0.05)


def model_with(aux_losses, checkpointing=None, dtype=torch.float64):
    model = tiny_llama(vocab_size=64).to(dtype)
    if checkpointing is not None:
        enable_checkpointing(model, checkpointing)
        model.enable_input_require_grads()
    torch.manual_seed(0)
    config = MoeLoraConfig(
        r=2,
        num_experts=EXPERTS,
        top_k=2,
        lora_dropout=0.0,
        router="sparsegen",  # has all that any loss reads
        target_modules=["q_proj", "down_proj"],
        aux_losses=aux_losses,
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=False).to(dtype)
    for layer in moelora_layers(model).values():
        torch.nn.init.normal_(layer.moelora_B["default"].weight, std=0.1)
    return model.train()


def batch():
    ids = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
        "task_id": torch.tensor([1, 0, 1]),
    }


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", LOSSES)
def test_in_a_model_the_gradient_is_that_of_the_loss_added_by_hand(name):
    inputs = batch()
    model = model_with({name: 0.7})
    plain = model(**inputs).loss
    plain.backward()
    found = gradients(model)
    assert set(layer_losses(model)) == {name}

    reference = model_with({name: 0.7})
    values = []

    def collect(update, inputs, adapter):
        values.append(LOSSES[name](inputs))
        return update

    for layer in moelora_layers(reference).values():
        layer.enter_losses = collect
    loss = reference(**inputs).loss
    torch.testing.assert_close(plain, loss, rtol=1e-12, atol=0)
    (loss + 0.7 * sum(values) / len(values)).backward()
    expected = gradients(reference)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        # Norms of float32 inside the model; sums in another order.
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-9)


def layer_losses(model):
    return {
        name: value
        for layer in moelora_layers(model).values()
        for name, value in layer.last_aux_losses["default"].items()
    }


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient_of_any_loss(use_reentrant):
    found = []
    for checkpointing in (None, use_reentrant):
        model = model_with(EVERYTHING, checkpointing)
        model(**batch()).loss.backward()
        found.append(gradients(model))
    expected, checkpointed = found
    assert expected.keys() == checkpointed.keys()
    for key, gradient in expected.items():
        # The same operations in the same order; attention may take another kernel.
        torch.testing.assert_close(checkpointed[key], gradient, rtol=1e-9, atol=1e-12)


def test_all_losses_at_once_under_autocast_stay_close_to_float32():
    found = []
    for enabled in (False, True):
        model = model_with(EVERYTHING, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(**batch()).loss.backward()
        losses = layer_losses(model)
        assert set(losses) == set(LOSSES)
        assert all(value.dtype == torch.float32 for value in losses.values())
        found.append(losses)
    plain, autocast = found
    for name, value in plain.items():
        # The layers' inputs went through a model in bfloat16 (8 bits); selections may flip.
        torch.testing.assert_close(autocast[name], value, rtol=0.25, atol=0.05)


def test_a_universal_expert_takes_no_part():
    config = {"contrastive": 0.1, "orthogonal": 0.1, "importance_cv2": 0.1}
    model = tiny_llama(vocab_size=64)
    model = get_peft_model(
        model,
        MoeLoraConfig(
            num_experts=3,
            top_k=1,
            r=2,
            universal_expert="one",
            target_modules=["q_proj"],
            aux_losses=config,
        ),
    ).train()
    model(**batch()).loss.backward()
    assert set(layer_losses(model)) == set(config)


def test_one_id_for_all_sequences_serves_too():
    model = model_with({"localized_cv2": 0.1})
    model(**{**batch(), "task_id": torch.tensor(1)})
    assert layer_losses(model)["localized_cv2"] > 0


def test_lambda_sparsity_is_zero_where_the_router_keeps_at_most_k_experts():
    """The loss and sparsegen agree on what lambda does."""
    kept = []
    model = model_with({})
    for layer in moelora_layers(model).values():
        layer.moelora_gate["default"].weight.data.mul_(3)  # so that some tokens keep few experts
        layer.moelora_router["default"].register_forward_hook(lambda *a: kept.append(a[2]))
    model(**batch())
    seen = set()
    for routing in kept:
        for t in range(len(routing.logits)):
            few = bool((routing.weights[t] > 0).sum() <= 2)
            one = LossInput(routing.rows(torch.tensor([t])))
            assert (LOSSES["lambda_sparsity"](one, k=2).item() < 1e-12) == few
            seen.add(few)
    assert seen == {True, False}


def test_a_run_with_all_losses_logs_each(tmp_path):
    rows = [
        {
            "input_ids": torch.arange(3 + i, 9 + i),
            "attention_mask": torch.ones(6, dtype=torch.long),
            "labels": torch.arange(3 + i, 9 + i),
            "task_id": torch.tensor(i % 2),
        }
        for i in range(4)
    ]
    trainer = Trainer(
        model=model_with(EVERYTHING, dtype=torch.float32),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            disable_tqdm=True,
        ),
        train_dataset=rows,
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 2
    for entry in steps:
        logged = {key.removeprefix("aux_") for key in entry if key.startswith("aux_")}
        assert logged == set(LOSSES)
