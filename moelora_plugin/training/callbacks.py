"""What training watches beside the loss: how the routers spread the tokens."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..analysis import routing_statistics
from .data import Collator

ROUTING_ROWS = 64  # enough tokens for a load per expert, and a few seconds on a CPU


class RoutingLog(TrainerCallback):
    """Adds how evenly the routers spread the tokens to the log history at every evaluation.

    Args:
        rows: the examples to route, of which a few are taken.
        collator: makes batches of them.
    """

    def __init__(self, rows: Dataset, collator: Collator) -> None:
        self._rows = rows
        self._collator = collator

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Append the routers' mean entropy and the largest load of any expert."""
        layers = record_routing(
            model, self._rows, self._collator, batch_size=args.per_device_eval_batch_size
        ).values()
        state.log_history.append(
            {
                "routing_entropy": sum(layer["entropy"] for layer in layers) / len(layers),
                "routing_max_load": max(max(layer["load"]) for layer in layers),
                "epoch": state.epoch or 0.0,
                "step": state.global_step,
            }
        )


def record_routing(
    model: Any, rows: Dataset, collator: Collator, *, batch_size: int
) -> dict[str, dict[str, Any]]:
    """Route a few examples without training on them.

    Rows are taken evenly, so that every task of a mixture counts, and batched here: a DataLoader
    would draw from the random numbers that training continues with.

    Args:
        model: the model with its adapter.
        rows: the examples, of which a few are taken.
        collator: makes batches of them.
        batch_size: examples at once.

    Returns:
        For each routed layer its expert loads and entropy, as `routing_statistics` gives them.
    """
    step = max(1, len(rows) // ROUTING_ROWS)
    examples = [rows[index] for index in range(0, len(rows), step)[:ROUTING_ROWS]]
    was_training = model.training
    model.eval()
    try:
        with routing_statistics(model) as statistics, torch.no_grad():
            for start in range(0, len(examples), batch_size):
                batch = collator(examples[start : start + batch_size])
                model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
    finally:
        model.train(was_training)
    layers: dict[str, dict[str, Any]] = statistics.to_dict()
    return layers
