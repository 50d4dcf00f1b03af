"""What is refused before a Trainer's first step: settings that would silently do something else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, PartialState
from peft import get_peft_model
from tiny import tiny_llama
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from moelora_plugin import MoeLoraConfig
from moelora_plugin.errors import ConfigError
from moelora_plugin.trainer_callbacks import AuxLossCallback, OptimizerCallback


def arguments(tmp_path, **keys) -> TrainingArguments:
    return TrainingArguments(
        str(tmp_path), use_cpu=True, dataloader_pin_memory=False, report_to=[], **keys
    )


def begin(callback, args, model=None):
    callback.on_train_begin(args, TrainerState(), TrainerControl(), model=model)


@pytest.fixture
def deepspeed(monkeypatch):
    """accelerate's state as DeepSpeed leaves it; TrainingArguments start it anew, so after them."""

    def configured(**config):
        Accelerator(cpu=True)
        plugin = SimpleNamespace(deepspeed_config=config, selected=True)
        for state, key, value in (
            (AcceleratorState, "deepspeed_plugins", {"default": plugin}),
            (PartialState, "distributed_type", DistributedType.DEEPSPEED),
        ):
            monkeypatch.setitem(state._shared_state, key, value)

    yield configured
    AcceleratorState._reset_state(reset_partial_state=True)


def test_every_trainer_has_the_callbacks_once(tmp_path):
    trainer = Trainer(model=tiny_llama(), args=arguments(tmp_path))
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert [kinds.count(kind) for kind in (AuxLossCallback, OptimizerCallback)] == [1, 1]


def test_an_optimizer_that_deepspeed_would_replace_is_refused(deepspeed, tmp_path):
    stock, ours = (arguments(tmp_path, optim=name) for name in ("sgd", "gradamw"))
    deepspeed(optimizer={"type": "AdamW"})
    begin(OptimizerCallback(), stock)
    with pytest.raises(ConfigError, match=r"^optim: gradamw is not used, .* remove that section"):
        begin(OptimizerCallback(), ours)


def test_deepspeed_without_an_optimizer_and_no_deepspeed_pass(deepspeed, tmp_path):
    args = arguments(tmp_path, optim="gradamw")
    begin(OptimizerCallback(), args)
    deepspeed(zero_optimization={"stage": 2})
    begin(OptimizerCallback(), args)


@pytest.mark.parametrize("aux_losses", [{}, {"z": 0.1}])
def test_losses_that_miss_the_loss_scale_are_refused(deepspeed, tmp_path, aux_losses):
    config = MoeLoraConfig(r=1, num_experts=2, top_k=1, aux_losses=aux_losses)
    model = get_peft_model(tiny_llama(), config)
    args = arguments(tmp_path)
    begin(AuxLossCallback(), args, model)
    deepspeed(zero_optimization={"stage": 2})
    begin(AuxLossCallback(), args, model)
    args.fp16 = True
    if not aux_losses:
        begin(AuxLossCallback(), args, model)
        return
    with pytest.raises(ConfigError, match=r"^aux_losses cannot know .* set bf16 in place of fp16"):
        begin(AuxLossCallback(), args, model)
