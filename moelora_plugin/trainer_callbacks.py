"""What transformers' Trainer has to tell our auxiliary losses, optimizers and guards.

Light on purpose: these are default callbacks of every Trainer in the process, ours or not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .errors import ConfigError
from .types import OptimizerName

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from .run_guards import Movement


class AuxLossCallback(TrainerCallback):
    """Scales the auxiliary losses as the Trainer scales its loss, and logs them as `aux_<name>`.

    With gradient accumulation the losses of an update are averaged over its micro-batches, the
    shorter last update of an epoch included; under fp16 they take the loss scaler's factor.
    """

    def __init__(self) -> None:
        self._layers: list[Any] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Find the layers that have auxiliary losses; there are none unless our tuner is there."""
        layers = _routed_layers(model)
        self._layers = [layer for layer in layers if any(layer.moelora_aux_losses.values())]
        if self._layers and args.fp16 and _deepspeed_config() is not None:
            raise ConfigError(
                "aux_losses cannot know the loss scale that DeepSpeed keeps under fp16; set bf16 "
                "in place of fp16."
            )

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Set the scale for the micro-batches of this update."""
        if not self._layers:
            return
        scaler = getattr(optimizer, "scaler", None)  # accelerate's optimizer has one under fp16
        factor = 1.0 if scaler is None else scaler.get_scale()
        micro_batches = _micro_batches(args, state, train_dataloader)
        for layer in self._layers:
            layer.aux_losses.scale = factor / micro_batches

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Add each loss, before its coefficient: the mean over layers in the last micro-batch."""
        if not self._layers or logs is None or "loss" not in logs:
            return
        entries = logged_aux_losses(self._layers)
        logs.update(entries)
        if state.log_history:
            state.log_history[-1].update(entries)  # the Trainer has put a copy there already

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Leave the model as it came."""
        for layer in self._layers:
            layer.aux_losses.scale = 1.0
        self._layers = []


def logged_aux_losses(layers: Iterable[Any]) -> dict[str, float]:
    """Each loss of the last micro-batch before its coefficient, averaged over layers."""
    values: dict[str, list[float]] = {}
    for layer in layers:
        for losses in layer.last_aux_losses.values():
            for name, value in losses.items():
                values.setdefault(f"aux_{name}", []).append(float(value))
    return {name: sum(found) / len(found) for name, found in values.items()}


class OptimizerCallback(TrainerCallback):
    """Stops a run whose `optim` names one of ours that would not be used."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Look whether DeepSpeed brings an optimizer: the Trainer then builds none."""
        name = getattr(args.optim, "value", args.optim)
        config = _deepspeed_config()
        if name in get_args(OptimizerName) and config is not None and "optimizer" in config:
            raise ConfigError(
                f"optim: {name} is not used, because the DeepSpeed config has an `optimizer` "
                "section; remove that section."
            )


class GuardCallback(TrainerCallback):
    """Ends a run of ours that trains nothing, saves less than it trains or resumes another run.

    A run without MoE-LoRA layers passes through it untouched.
    """

    def __init__(self) -> None:
        self._movement: Movement | None = None
        self._checkpoint: Path | None = None

    def before_train(self, model: Any, checkpoint: Path | None) -> None:
        """Take the folder that the run goes on from; the Trainer tells its callbacks too late.

        Raises:
            ConfigError: it holds another adapter than the run asks for.
        """
        self._checkpoint = checkpoint
        if checkpoint is not None and _routed_layers(model):
            from .run_guards import refuse_other_run

            refuse_other_run(model, checkpoint)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Note what trains, and compare what the optimizer has decided."""
        self._movement = None
        if not _routed_layers(model):
            return
        from .run_guards import Movement, refuse_other_run

        if self._checkpoint is not None:
            refuse_other_run(model, self._checkpoint, optimizer_is_built=True)
        self._movement = Movement(model)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Look at the gradients."""
        if self._movement is not None:
            self._movement.before_update()

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Count an update, unless a loss scaler skipped it or a warm-up's learning rate is 0."""
        if self._movement is None or getattr(optimizer, "step_was_skipped", False):
            return
        ours = {id(parameter) for parameter in self._movement.parameters}
        groups = optimizer.param_groups
        own = [group for group in groups if any(id(p) in ours for p in group["params"])]
        if any(group["lr"] > 0 for group in own or groups):  # DeepSpeed's hold none of ours
            self._movement.after_update(gradients_seen=_deepspeed_config() is None)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Look whether the checkpoint holds the adapter."""
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        # A search for hyperparameters saves elsewhere.
        if self._movement is not None and args.should_save and folder.is_dir():
            from .run_guards import check_saved

            check_saved(model, folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Judge the run."""
        movement, self._movement = self._movement, None
        if movement is not None:
            movement.end()


def _routed_layers(model: Any) -> list[Any]:
    """Our layers; there are none unless our tuner is imported."""
    tuners = sys.modules.get(f"{__package__}.model")
    return [] if tuners is None else list(tuners.routed_layers(model).values())


def _deepspeed_config() -> dict[str, Any] | None:
    """DeepSpeed's configuration where accelerate runs it, else None."""
    from accelerate.state import AcceleratorState, is_initialized

    plugin = getattr(AcceleratorState(), "deepspeed_plugin", None) if is_initialized() else None
    return None if plugin is None else plugin.deepspeed_config


def _micro_batches(args: TrainingArguments, state: TrainerState, dataloader: Any) -> int:
    """How many micro-batches the update that now begins has."""
    accumulation = args.gradient_accumulation_steps
    try:
        batches = len(dataloader)
    except TypeError:  # a stream; the Trainer takes full updates from it
        return accumulation
    updates = -(-batches // accumulation)
    is_last = state.global_step % max(updates, 1) == updates - 1
    return (batches % accumulation or accumulation) if is_last else accumulation
