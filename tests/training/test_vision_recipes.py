"""The recipes with images are Tables 3 and 12 of the paper."""

from __future__ import annotations

from pathlib import Path

import pytest

from moelora_eval_tasks.catalog import resolve
from moelora_plugin.training import load_recipe
from moelora_plugin.training.run import adapter_config

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("benchmark", ["vmcbench", "visual7w"])
def test_recipe_is_table_12(benchmark: str) -> None:
    recipe = load_recipe(RECIPES / f"vision-{benchmark}.yaml")
    assert [task.name for task in resolve(recipe.data.tasks)] == [f"{benchmark}_paper"]
    given, training = recipe.optimizer, recipe.training
    assert (given.name, given.lr, given.gate_lr, given.gate_max_grad_norm) == (
        "gradamw",
        1e-5,
        3e-8,
        1.0,
    )
    batch = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    assert (batch, training["max_steps"], training["warmup_steps"]) == (40, 1000, 0)
    config = adapter_config(recipe)
    assert (config.num_experts, config.top_k, config.r) == (20, 10, 4)
    assert "out_proj" in config.target_modules  # the vision tower's
    assert recipe.data.max_length > 576  # LLaVA-1.5's tokens of one image
    assert recipe.output_dir == f"runs/vision-{benchmark}"
