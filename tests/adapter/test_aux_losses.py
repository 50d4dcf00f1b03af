"""How auxiliary losses enter: their gradient against the loss added by hand, and the Trainer.

What the losses are is tested in tests/methods, as is what holds for each.
"""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from peft import get_peft_model
from tiny import enable_checkpointing, tiny_llama
from transformers import Trainer, TrainingArguments

from moelora_plugin import MoeLoraConfig
from moelora_plugin.errors import ConfigError
from moelora_plugin.model import find_tuner, moelora_layers
from moelora_plugin.types import Routing

COEFFICIENTS = {"switch_lb": 0.3, "z": 0.02}


def by_hand(name: str, routing: Routing, real: torch.Tensor) -> torch.Tensor:
    """The formulas, token by token."""
    tokens = [t for t in range(len(real)) if real[t]]
    experts = routing.probs.shape[-1]
    if name == "z":
        return sum(routing.logits[t].exp().sum().log() ** 2 for t in tokens) / len(tokens)
    total = routing.probs.new_zeros(())
    for e in range(experts):
        share = sum(float(routing.weights[t, e] > 0) for t in tokens) / len(tokens)
        total = total + share * sum(routing.probs[t, e] for t in tokens) / len(tokens)
    return experts * total


def model_with(aux_losses, *, dropout=0.0, checkpointing=None, seed=0):
    model = tiny_llama(vocab_size=64, seed=seed).double()  # so that only a wrong formula differs
    if checkpointing is not None:
        enable_checkpointing(model, checkpointing)
        model.enable_input_require_grads()
    torch.manual_seed(seed)
    model = get_peft_model(
        model,
        MoeLoraConfig(
            r=2,
            num_experts=4,
            top_k=2,
            lora_dropout=dropout,
            target_modules=["q_proj", "down_proj"],
            aux_losses=aux_losses,
        ),
        autocast_adapter_dtype=False,
    ).double()
    for layer in moelora_layers(model).values():  # B is zero at first: nothing would reach below
        torch.nn.init.normal_(layer.moelora_B["default"].weight, std=0.1)
    return model.train()


def batch(seed=0, rows=3, length=7):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def summand(model, inputs):
    """coef * mean over layers, from the routings of a forward pass that is going on."""
    real = inputs["attention_mask"].bool().flatten()
    layers = moelora_layers(model).values()
    return sum(
        COEFFICIENTS[name] * by_hand(name, layer.kept_routing, real) / len(layers)
        for layer in layers
        for name in COEFFICIENTS
    )


def keep_routing(model):
    """Keep each layer's routing with its graph, which the layer itself does not."""
    for layer in moelora_layers(model).values():
        router = layer.moelora_router["default"]
        router.register_forward_hook(
            lambda _module, _args, routing, layer=layer: setattr(layer, "kept_routing", routing)
        )


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # float64 with norms and softmax in fp32 inside the model, and sums taken in another order.
        error = (found[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-5, (name, float(error))
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_gradient_is_that_of_the_loss_added_by_hand(checkpointing, loss_scale):
    inputs = batch()
    reference = model_with({})
    keep_routing(reference)
    loss = reference(**inputs).loss
    ((loss + summand(reference, inputs)) * loss_scale).backward()
    expected = gradients(reference)

    model = model_with(COEFFICIENTS, checkpointing=checkpointing)
    find_tuner(model).aux_losses.scale = loss_scale
    found = model(**inputs).loss
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)  # the host's loss is untouched
    (found * loss_scale).backward()
    assert_same_gradients(gradients(model), expected)


def test_without_the_losses_the_gradient_differs():
    inputs = batch()
    found = []
    for aux_losses in ({}, COEFFICIENTS):
        model = model_with(aux_losses)
        model(**inputs).loss.backward()
        found.append(gradients(model))
    for name in found[0]:
        # Nothing of what the last layer's experts add is read by any router.
        top = "layers.1.mlp.down_proj" in name and "moelora_gate" not in name
        assert torch.allclose(found[0][name], found[1][name], rtol=1e-3) == top, name


def masks_of(model):
    """Which tokens each loss of the coming passes takes for real, in a list that fills."""
    seen = []

    def watch(enter):
        def watching(update, inputs, adapter):
            seen.append(inputs.real)
            return enter(update, inputs, adapter)

        return watching

    for layer in moelora_layers(model).values():
        layer.enter_losses = watch(layer.enter_losses)
    return seen


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_layer_has_its_own_pass_s_mask(use_reentrant):
    inputs = batch()
    real = inputs["attention_mask"].bool().flatten()
    model = model_with(COEFFICIENTS, checkpointing=use_reentrant)
    seen = masks_of(model)
    output = model(**inputs).loss
    model(input_ids=inputs["input_ids"][:1])  # a pass of its own between forward and backward
    before_recomputation = len(seen)
    output.backward()
    assert len(seen) > before_recomputation
    assert all(torch.equal(mask, real) for mask in seen[before_recomputation:])


def test_no_mask_means_all_tokens():
    model = model_with(COEFFICIENTS)
    seen = masks_of(model)
    model(**batch())
    model(input_ids=batch()["input_ids"], labels=batch()["input_ids"])
    assert [mask is None for mask in seen] == [False] * 4 + [True] * 4


def test_evaluation_has_no_aux_losses():
    model = model_with(COEFFICIENTS).eval()
    model(**batch())
    assert all(not layer.last_aux_losses for layer in moelora_layers(model).values())


def test_a_second_adapter_with_losses_is_masked_too():
    model = model_with({})
    model.add_adapter(
        "second",
        MoeLoraConfig(r=2, num_experts=3, top_k=1, target_modules=["q_proj"], aux_losses={"z": 1}),
    )
    model.set_adapter("second")
    seen = masks_of(model)
    model(**batch())
    assert find_tuner(model).aux_losses.num_layers == {"default": 4, "second": 2}
    assert len(seen) == 2
    assert all(torch.equal(mask, batch()["attention_mask"].bool().flatten()) for mask in seen)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_keeps_its_own_mask(copied):
    model = model_with(COEFFICIENTS)
    model(**batch())
    twin = copied(model)
    inputs = batch()
    seen = masks_of(twin)
    twin(**inputs).loss.backward()
    assert all(torch.equal(mask, inputs["attention_mask"].bool().flatten()) for mask in seen)
    model(**inputs).loss.backward()
    assert_same_gradients(gradients(twin), gradients(model))


def test_an_unknown_loss_offers_the_nearest():
    with pytest.raises(ConfigError, match=r"Unknown loss 'switch'; did you mean 'switch_lb'\?"):
        model_with({"switch": 0.1})


@pytest.mark.parametrize("value", [-1, math.inf, math.nan, "0.1", True])
def test_a_coefficient_must_be_a_number(value):
    with pytest.raises(ConfigError, match=r"aux_losses\['z'\]=.* must be a number of at least 0"):
        MoeLoraConfig(aux_losses={"z": value})


class ByHandTrainer(Trainer):
    """Adds the auxiliary losses to the loss, as somebody would without us."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        # transformers normalises the loss itself by the tokens of the whole update.
        return loss + summand(model, inputs) / self.current_gradient_accumulation_steps


@pytest.mark.parametrize("accumulation", [1, 3])
def test_trainer_with_gradient_accumulation_equals_the_loss_added_by_hand(tmp_path, accumulation):
    # 8 rows, batches of 2, updates of 3 batches: the epoch's last update is a short one.
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (5, 6, 7, 5, 6, 7, 5, 6):
        ids = torch.randint(3, 64, (length,), generator=generator)
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})

    def collate(examples):
        length = max(len(example["input_ids"]) for example in examples)
        fillers = {"input_ids": 2, "attention_mask": 0, "labels": -100}
        return {
            key: torch.stack(
                [
                    torch.nn.functional.pad(e[key], (0, length - len(e[key])), value=filler)
                    for e in examples
                ]
            )
            for key, filler in fillers.items()
        }

    def trained(trainer_class, aux_losses):
        model = model_with(aux_losses)
        keep_routing(model)
        trainer = trainer_class(
            model=model,
            args=TrainingArguments(
                output_dir=str(tmp_path / trainer_class.__name__),
                per_device_train_batch_size=2,
                gradient_accumulation_steps=accumulation,
                num_train_epochs=2,
                learning_rate=0.01,
                optim="sgd",
                lr_scheduler_type="constant",
                logging_steps=1,
                max_grad_norm=0.0,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                dataloader_pin_memory=False,
                disable_tqdm=True,
            ),
            train_dataset=rows,
            data_collator=collate,
        )
        trainer.train()
        weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        return weights, trainer.state.log_history

    expected, _ = trained(ByHandTrainer, {})
    found, history = trained(Trainer, COEFFICIENTS)
    for name, weight in expected.items():
        error = (found[name] - weight).abs().max() / weight.abs().max()
        assert error < 1e-5, (name, float(error))  # as above, over up to eight updates
    steps = [entry for entry in history if "loss" in entry]
    assert all(1.9 < entry["aux_switch_lb"] < 4 and entry["aux_z"] > 0 for entry in steps)
