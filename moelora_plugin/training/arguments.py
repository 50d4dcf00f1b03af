"""A recipe as transformers' TrainingArguments."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..errors import ConfigError, first_line
from ..lookup import unknown_name_message
from ..schema import require
from .recipe import Recipe

# Fields that the recipe sets elsewhere; a second place to set them would be ignored or contradict.
_SET_BY = {
    "output_dir": "output_dir",
    "seed": "seed",
    "data_seed": "seed",
    "optim": "optimizer.name",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "resume_from_checkpoint": "--resume",
    "push_to_hub": "moelora export --push-to-hub",
}


def training_arguments(recipe: Recipe, checkpoints: Path) -> TrainingArguments:
    """TrainingArguments for a recipe: our defaults, then whatever `training` says.

    Args:
        recipe: the recipe.
        checkpoints: folder for the checkpoints.

    Raises:
        ConfigError: a key of `training` is unknown or set elsewhere, or a value is refused.
    """
    fields = dataclasses.fields(TrainingArguments)
    known = [f"training.{field.name}" for field in fields if field.init]
    for key in recipe.training:
        if key in _SET_BY:
            raise ConfigError(f"training.{key} is set by {_SET_BY[key]}; remove it from training.")
        if f"training.{key}" not in known:
            raise ConfigError(unknown_name_message("recipe key", f"training.{key}", known))
    values = {
        "output_dir": str(checkpoints),
        "seed": recipe.seed,
        "learning_rate": recipe.optimizer.lr,
        "logging_steps": 10,
        # transformers' default is True, of which torch warns on machines without CUDA.
        "dataloader_pin_memory": torch.cuda.is_available(),
        # The filter would hide from the log, and from us, that a run has diverged.
        "logging_nan_inf_filter": False,
        # The paper clips the gates' gradient only, which the optimizer does.
        "max_grad_norm": 0.0,
        # The ids of tasks and clusters are no arguments of the base's forward; our hook takes them.
        "remove_unused_columns": False,
        # Without it, resuming starts early stopping's patience anew.
        "restore_callback_states_from_checkpoint": True,
        **_schedule(recipe),
        **_evaluation(recipe),
        **recipe.training,
    }
    try:
        return TrainingArguments(**values)
    except Exception as error:  # what values of the wrong type lead to differs from field to field
        raise ConfigError(
            f"transformers refuses the training section: {first_line(error)}."
        ) from error


def _schedule(recipe: Recipe) -> dict[str, Any]:
    """The linear schedule that ends at `final_lr_ratio` of every group's learning rate.

    transformers' `polynomial` of power 1 is the linear schedule that may end above 0. Its `lr_end`
    is relative to the optimizer's default rate, and the resulting factor multiplies every group's.
    """
    if "lr_scheduler_type" in recipe.training:
        return {}
    optimizer = recipe.optimizer
    if optimizer.final_lr_ratio == 1:
        return {"lr_scheduler_type": "constant_with_warmup"}
    lr_end = optimizer.lr * optimizer.final_lr_ratio
    return {
        "lr_scheduler_type": "polynomial",
        "lr_scheduler_kwargs": {"lr_end": lr_end, "power": 1.0},
    }


def _evaluation(recipe: Recipe) -> dict[str, Any]:
    """Evaluate where the recipe says how often, or wants to stop early; else not at all."""
    if "eval_steps" not in recipe.training and recipe.early_stopping is None:
        return {}
    eval_steps = recipe.training.get("eval_steps", 100)
    values: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": eval_steps}
    if recipe.early_stopping is not None:
        # transformers only asks for a multiple, and then restores the best of the saved steps.
        save_steps = recipe.training.get("save_steps", eval_steps)
        expected = f"training.eval_steps ({eval_steps}), so that the best step is saved,"
        require(save_steps == eval_steps, "training.save_steps", save_steps, expected)
        values |= {
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
            "save_strategy": recipe.training.get("eval_strategy", "steps"),
            "save_steps": save_steps,
        }
    return values
