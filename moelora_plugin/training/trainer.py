"""transformers' Trainer with a Riemannian optimizer and checkpoints that are whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..files import put_folder
from ..optim import build_optimizer

STAGING = ".partial"  # not `checkpoint-N`, so nothing that looks for checkpoints sees it


class MoeLoraTrainer(Trainer):
    """A Trainer for a model with a MoE-LoRA adapter.

    Args:
        optimizer_arguments: keyword arguments of `build_optimizer`.
        **trainer: transformers' own arguments.
    """

    def __init__(self, *, optimizer_arguments: Mapping[str, Any], **trainer: Any) -> None:
        super().__init__(**trainer)
        self._optimizer_arguments = dict(optimizer_arguments)
        self._is_staging = False

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the recipe, over the adapter's pairs and gates."""
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            self.optimizer = build_optimizer(trained, **self._optimizer_arguments)
        return self.optimizer

    def _get_output_dir(self, trial: Any) -> str:
        run_dir: str = super()._get_output_dir(trial)
        return os.path.join(run_dir, STAGING) if self._is_staging else run_dir

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Let transformers write the checkpoint into a folder of ours, then move it into place.

        A crash while writing leaves no `checkpoint-N` behind for `--resume last` to pick.
        """
        run_dir = Path(self._get_output_dir(trial))
        staging, name = run_dir / STAGING, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            self._is_staging = True
            super()._save_checkpoint(model, trial)
            self._is_staging = False
            if self.state.best_model_checkpoint == str(staging / name):
                self.state.best_model_checkpoint = str(run_dir / name)
                if self.args.should_save:
                    self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()  # every process writes a file of its own
            if self.args.should_save:
                # A resumed run may come past a step that an earlier run has saved.
                put_folder(staging / name, run_dir / name)
                rotate_checkpoints(
                    str(run_dir),
                    save_total_limit=self.args.save_total_limit,
                    best_model_checkpoint=self.state.best_model_checkpoint,
                    use_mtime=True,
                )
            self.accelerator.wait_for_everyone()
        finally:
            self._is_staging = False
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
