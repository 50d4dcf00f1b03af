"""A tiny base model and invented rows on disk, and recipes that train on them in a second."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny import tiny_llama, tiny_tokenizer

from moelora_eval_tasks.catalog import TASKS
from moelora_plugin.schema import from_mapping
from moelora_plugin.training.recipe import Recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama and its tokenizer, saved."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Invented rows of three tasks in the layout of a data folder."""
    folder = tmp_path_factory.mktemp("data")
    generator = random.Random(0)
    words = ("warm", "sharp", "moving", "dull", "flat", "clumsy")
    for split, count in (("train", 48), ("validation", 12)):
        chosen = [generator.choice(words) for _ in range(count)]
        labels = [int(word in words[:3]) for word in chosen]
        sentences = [f"a {word} film, number {number}" for number, word in enumerate(chosen)]
        ratings = [round(generator.uniform(0, 5), 1) for _ in range(count)]
        _write(folder, "sst2", split, {"sentence": sentences, "label": labels})
        _write(folder, "cola", split, {"sentence": sentences[:8], "label": labels[:8]})
        _write(
            folder,
            "stsb",
            split,
            {"sentence1": sentences, "sentence2": sentences[::-1], "label": ratings},
        )
    return folder


def _write(folder: Path, task: str, split: str, columns: dict[str, list[Any]]) -> None:
    (folder / TASKS[task].folder).mkdir(exist_ok=True)
    Dataset.from_dict(columns).to_parquet(folder / TASKS[task].folder / f"{split}.parquet")


@pytest.fixture
def make_recipe(base: Path, data_dir: Path, tmp_path: Path) -> MakeRecipe:
    """Builds a recipe that trains a small mixture for a few steps; keywords replace its keys."""

    def make(**sections: Any) -> Recipe:
        values: dict[str, Any] = {
            "model": {"name": str(base)},
            "adapter": {"preset": "moe_lora", "num_experts": 4, "top_k": 2, "r": 2},
            "optimizer": {"name": "gradamw", "lr": 3e-3},
            "data": {"tasks": ["sst2"], "data_dir": str(data_dir), "max_length": 128},
            "training": {
                "max_steps": 8,
                "per_device_train_batch_size": 4,
                "logging_steps": 1,
                "save_steps": 4,
                "disable_tqdm": True,
                "use_cpu": True,
            },
            "output_dir": str(tmp_path / "run"),
        }
        for name, value in sections.items():
            below = values.get(name)
            values[name] = {**below, **value} if isinstance(below, dict) else value
        return from_mapping(Recipe, values)

    return make
