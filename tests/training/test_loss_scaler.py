"""fp16 training scales its loss: auxiliary losses must be scaled alike.

accelerate takes fp16 on accelerators only; so the scaler that it makes there is put in by hand:
everything else (backward, optimizer, callback) is the Trainer's and accelerate's own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_llama
from transformers import Trainer, TrainingArguments

from moelora_plugin import MoeLoraConfig
from moelora_plugin.model import find_tuner


def trained(tmp_path: Path, optim: str, scaler: torch.amp.GradScaler | None) -> dict:
    torch.manual_seed(0)
    config = MoeLoraConfig(
        r=2,
        num_experts=4,
        top_k=2,
        lora_dropout=0.0,
        target_modules=["q_proj", "down_proj"],
        aux_losses={"switch_lb": 0.3, "z": 0.02},
    )
    model = get_peft_model(tiny_llama(vocab_size=64), config)
    for name, parameter in model.named_parameters():
        if "moelora_B" in name:  # zero at first: no gradient would reach A
            torch.nn.init.normal_(parameter, std=0.1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (10, 7), generator=generator)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=6,
            learning_rate=0.01,
            optim=optim,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
    )
    trainer.accelerator.scaler = scaler
    trainer.train()
    assert find_tuner(model).aux_losses.scale == 1.0
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("optim", ["sgd", "gradamw"])
def test_a_loss_scaler_changes_nothing(tmp_path: Path, optim: str) -> None:
    # It grows every other step, so the factor has to be read anew. Powers of two are exact.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    expected = trained(tmp_path, optim, None)
    found = trained(tmp_path, optim, scaler)
    assert scaler.get_scale() == 2.0**13
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
