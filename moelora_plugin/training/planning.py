"""The plan of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..analysis.plan import AdapterPlan, Step, plan_adapter
from ..errors import ConfigError
from ..schema import from_mapping, require
from .recipe import Recipe
from .run import adapter_config
from .yaml_files import apply_override, read_recipe_file, section

# What transformers' TrainingArguments has for per_device_train_batch_size.
_BATCH = 8


def plan(path: str | Path | None = None, overrides: Sequence[str] = ()) -> AdapterPlan:
    """Count what a recipe's training will take; nothing is loaded but the base's config.json.

    Read are the sections model, adapter, optimizer and training (batch size, bf16 or fp16, gradient
    checkpointing), and data.max_length, which every sequence counts as long as.

    Args:
        path: the recipe; without one, `overrides` alone say everything.
        overrides: `key=value` with dotted keys, as `load_recipe` takes them.

    Raises:
        ConfigError: a file cannot be read, a key or value is wrong, or the base does not take the
            adapter.
        MissingDependencyError: the base's configuration is not here and the hub is out of reach.
    """
    values = {} if path is None else read_recipe_file(Path(path))
    for override in overrides:
        apply_override(values, override)
    if not section(values, "model").get("name"):
        raise ConfigError(
            "There is no base to plan for; pass --model, or a recipe with model.name."
        )
    section(values, "data").setdefault("tasks", ["sst2"])  # a recipe has some, a plan reads none
    given = {key: value for key, value in values.items() if value is not None}
    recipe = from_mapping(Recipe, {"output_dir": "", **given})
    return plan_adapter(
        recipe.model.name,
        adapter_config(recipe),
        _step(recipe),
        revision=recipe.model.revision,
        dtype=recipe.model.dtype,
    )


def _step(recipe: Recipe) -> Step:
    training = recipe.training
    batch = training.get("per_device_train_batch_size", _BATCH)
    valid = type(batch) is int and batch > 0
    require(valid, "training.per_device_train_batch_size", batch, "a number above 0")
    half = next((dtype for key, dtype in _HALVES.items() if training.get(key)), None)
    return Step(
        optimizer=recipe.optimizer.name,
        batch=batch,
        length=recipe.data.max_length,
        autocast=half,
        checkpointing=bool(training.get("gradient_checkpointing")),
    )


# transformers' own words for mixed precision.
_HALVES = {"bf16": "bfloat16", "fp16": "float16"}
