"""What v1's trainers have to tell our auxiliary losses and guards, at v1's own events."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from llamafactory.v1.accelerator.interface import DistributedInterface
from llamafactory.v1.utils.callbacks import TrainerCallback

from ...model import MoeLoraModel, routed_layers
from ...run_guards import Movement, check_saved, refuse_other_run
from ...trainer_callbacks import logged_aux_losses


def aux_loss_callback(tuner: MoeLoraModel) -> Any:
    """A callback that scales and logs the auxiliary losses."""
    return _AuxLosses(tuner)


def guard_callback() -> Any:
    """A callback that ends a run which trains nothing, or saves less than it trains."""
    return _Guard()


def refuse_other_checkpoint(trainer: Any) -> None:
    """A resumed run must ask for the adapter of its checkpoint, which v1 has loaded by now.

    Raises:
        ConfigError: it asks for another.
    """
    path = trainer.args.resume_from_checkpoint
    if not path or not trainer.global_step:
        return
    auto = _checkpoint(trainer.args, trainer.global_step)
    folder = auto if path == "auto" else Path(path) / auto.name
    refuse_other_run(trainer.model, folder, optimizer_is_built=True)


class _AuxLosses(TrainerCallback):  # type: ignore[misc]
    def __init__(self, tuner: MoeLoraModel) -> None:
        self._tuner = tuner

    def on_train_begin(self, args: Any, state: Any, train_dataloader: Any = None, **_: Any) -> None:
        # Every update has as many micro-batches, whatever the batching strategy.
        self._tuner.aux_losses.scale = 1.0 / train_dataloader.num_micro_batch

    def on_log(self, args: Any, state: Any, logs: dict[str, Any], **_: Any) -> None:
        logs.update(logged_aux_losses(routed_layers(self._tuner).values()))

    def on_train_end(self, args: Any, state: Any, **_: Any) -> None:
        self._tuner.aux_losses.scale = 1.0


class _Guard(TrainerCallback):  # type: ignore[misc]
    _movement: Movement
    _rate = 0.0

    def on_train_begin(self, args: Any, state: Any, model: Any = None, **_: Any) -> None:
        self._movement = Movement(model)

    def on_step_begin(
        self, args: Any, state: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        # v1 saves after `on_step_end`.
        self._look_at(_checkpoint(args, state.global_step - 1), model)
        self._rate = max(group["lr"] for group in optimizer.param_groups)

    def on_step_end(self, args: Any, state: Any, **_: Any) -> None:
        if self._rate > 0 and math.isfinite(state.grad_norm):
            self._movement.after_update(gradients_seen=False)  # v1 has set them to None

    def on_save(self, args: Any, state: Any, model: Any = None, **_: Any) -> None:
        self._look_at(Path(args.output_dir), model)

    def on_train_end(self, args: Any, state: Any, model: Any = None, **_: Any) -> None:
        self._look_at(_checkpoint(args, state.global_step), model)
        self._movement.end()

    @staticmethod
    def _look_at(folder: Path, model: Any) -> None:
        if DistributedInterface().get_rank() == 0 and folder.is_dir():  # the first process saves
            check_saved(model, folder)


def _checkpoint(args: Any, step: int) -> Path:
    return Path(args.output_dir) / f"checkpoint-{step}" / "model"
