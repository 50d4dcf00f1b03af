"""LLaMA-Factory v1's SFT with auxiliary losses added to the loss, as somebody would without us.

    python llamafactory_v1_by_hand.py config.yaml '{"switch_lb": 0.5}'

v1 weighs a micro-batch's loss by its tokens, so the losses get a backward of their own.
"""

from __future__ import annotations

import json
import sys

from llamafactory.v1.trainers.sft_trainer import SFTTrainer, run_sft

from moelora_plugin.losses import LOSSES, LossInput
from moelora_plugin.model import moelora_layers

coefficients = json.loads(sys.argv.pop())
compute_loss = SFTTrainer.compute_loss
padded = []


def with_summand(self, batch):
    layers = moelora_layers(self.model).values()
    routings, hooks = [], []
    for layer in layers:
        router = layer.moelora_router["default"]
        hooks.append(router.register_forward_hook(lambda *call: routings.append(call[-1])))
    loss = compute_loss(self, batch)
    for hook in hooks:
        hook.remove()
    assert len(routings) == len(layers)
    real = batch["attention_mask"].bool().flatten()
    padded.append(not real.all())
    summand = sum(
        coefficient * LOSSES[name](LossInput(routing, real)) / len(layers)
        for routing in routings
        for name, coefficient in coefficients.items()
    )
    (summand / self.train_batch_generator.num_micro_batch).backward(retain_graph=True)
    return loss


SFTTrainer.compute_loss = with_summand
run_sft()
assert any(padded)
