"""Refuse to show images to a model that has no eyes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moelora_eval_tasks.catalog import Task

from ..base_model import shows_images
from ..errors import ConfigError


def refuse_images(model_or_config: Any, tasks: Sequence[Task]) -> None:
    """Check that a model can be asked about what the tasks show.

    Raises:
        ConfigError: a task shows images and the model takes text alone.
    """
    showing = [task.name for task in tasks if task.shows_images]
    if showing and not shows_images(model_or_config):
        config = getattr(model_or_config, "config", model_or_config)
        raise ConfigError(
            f"A {config.model_type} model cannot be shown the images of {', '.join(showing)}; take "
            "that out of --tasks, or evaluate a vision model."
        )
