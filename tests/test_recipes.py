"""The recipes are the paper's Table 12, for each of its experiments with the text tasks."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from moelora_eval_tasks.catalog import resolve
from moelora_plugin.training import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
PAPER = RECIPES / "paper"

QA = ("scienceqa", "commonsenseqa", "openbookqa", "siqa")
GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
MIXTURES = {"cola-sst2-mrpc": ("cola", "sst2", "mrpc"), "stsb-qqp-qnli": ("stsb", "qqp", "qnli")}


class Rates(NamedTuple):
    """A row of Table 12: the experts' initial learning rate."""

    sgd: float | None
    adamw: float


# Table 12 of arXiv 2502.15828, column by column. Table 11's mixtures were trained with AdamW only.
TABLE_12 = {
    "llama-3.2-3b": {
        "scienceqa": Rates(3e-5, 1e-5),
        "commonsenseqa": Rates(3e-5, 1e-5),
        "openbookqa": Rates(3e-5, 1e-5),
        "siqa": Rates(3e-5, 1e-5),
        "cola": Rates(3e-5, 3e-5),
        "sst2": Rates(3e-5, 1e-5),
        "mrpc": Rates(3e-5, 3e-5),
        "stsb": Rates(3e-5, 3e-5),
        "qqp": Rates(3e-5, 1e-5),
        "mnli": Rates(3e-5, 1e-5),
        "qnli": Rates(3e-5, 3e-5),
        "rte": Rates(3e-5, 1e-6),
        "wnli": Rates(3e-6, 1e-5),
        "cola-sst2-mrpc": Rates(None, 1e-4),
        "stsb-qqp-qnli": Rates(None, 1e-4),
    },
    "glm-4-9b": {
        "cola": Rates(3e-6, 1e-6),
        "sst2": Rates(3e-6, 1e-6),
        "mrpc": Rates(3e-6, 1e-6),
        "stsb": Rates(3e-5, 1e-5),
        "qqp": Rates(3e-5, 1e-5),
        "mnli": Rates(3e-5, 3e-6),
        "qnli": Rates(3e-5, 1e-5),
        "rte": Rates(3e-5, 1e-5),
        "wnli": Rates(3e-5, 1e-5),
    },
}

EXPECTED = {
    f"{model}/{experiment}/{optimizer}": rate
    for model, experiments in TABLE_12.items()
    for experiment, rates in experiments.items()
    for optimizer, rate in (
        ("rsgd", rates.sgd),
        ("grsgd", rates.sgd),
        ("radamw", rates.adamw),
        ("gradamw", rates.adamw),
    )
    if rate is not None
}


def test_there_is_a_recipe_for_each_experiment_and_no_other() -> None:
    found = {
        path.relative_to(PAPER).with_suffix("").as_posix() for path in PAPER.glob("*/*/*.yaml")
    }
    assert found == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_recipe_is_table_12(name: str) -> None:
    model, experiment, optimizer = name.split("/")
    recipe = load_recipe(PAPER / f"{name}.yaml")
    assert recipe.optimizer.name == optimizer
    assert recipe.optimizer.lr == EXPECTED[name]
    assert recipe.output_dir == f"runs/paper/{name}"
    assert tuple(recipe.data.tasks) == MIXTURES.get(experiment, (experiment,))
    assert [task.name for task in resolve(recipe.data.tasks)] == recipe.data.tasks
    assert (
        recipe.model.name
        == {
            "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
            "glm-4-9b": "THUDM/glm-4-9b-hf",
        }[model]
    )
    # Table 12's remaining rows.
    given = recipe.optimizer
    assert (given.gate_lr, given.gate_max_grad_norm, given.weight_decay) == (3e-8, 1.0, 0.0)
    assert (given.betas, given.eps) == ((0.9, 0.999), 1e-6)
    training = recipe.training
    batch = training["per_device_train_batch_size"]
    assert batch * training["gradient_accumulation_steps"] == 80
    assert (training["max_steps"], training["warmup_steps"]) == (2000, 0)
    assert "lr_scheduler_type" not in training  # the recipe's own schedule is the linear one


@pytest.mark.parametrize(
    "path", sorted(PAPER.glob("*/base.yaml")), ids=lambda path: path.parent.name
)
def test_adapter_is_the_papers_mixture(path: Path) -> None:
    from moelora_plugin import MoeLoraConfig

    first = sorted(path.parent.glob("*/*.yaml"))[0]
    fields = dict(load_recipe(first).adapter)
    config = MoeLoraConfig.from_preset(fields.pop("preset"), **fields)
    assert (config.num_experts, config.top_k, config.r) == (20, 10, 4)
    assert (config.lora_alpha, config.lora_dropout) == (16, 0.05)
    assert config.gate_rescale == "auto"


@pytest.mark.parametrize(
    "path", [RECIPES / "quickstart.yaml", *sorted(PAPER.glob("*/*/rsgd.yaml"))[:1]]
)
def test_training_section_names_transformers_arguments(path: Path) -> None:
    import dataclasses

    from transformers import TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(load_recipe(path).training) <= known


def test_quickstart_is_sized_for_a_cpu() -> None:
    recipe = load_recipe(RECIPES / "quickstart.yaml")
    assert recipe.model.dtype == "float32"
    assert recipe.data.tasks == ["sst2"]
    assert recipe.output_dir == "runs/quickstart"
    examples = recipe.training["max_steps"] * recipe.training["per_device_train_batch_size"]
    assert examples * recipe.data.max_length <= 60_000  # at about 150 tokens a second on two cores
