"""Search from a recipe: its base, its data, its adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import set_seed

from moelora_eval_tasks.catalog import resolve

from ..files import check_out_file, write_json
from ..reading import read_json
from ..tables import PlainTable
from ..training import Recipe
from ..training.arguments import training_arguments
from ..training.base import load_model, load_processor
from ..training.data import collator_for, load_data
from ..training.run import adapter_config
from .guilomo import GuiLoMoResult, search_guilomo


@dataclass(frozen=True)
class SearchResult:
    """An allocation and where it stands.

    Attributes:
        file: the JSON file, for `allocation_kwargs: {path: FILE}`.
        found: the search's own result.
    """

    file: Path
    found: GuiLoMoResult

    def table(self) -> PlainTable:
        """The allocation for a terminal."""
        table = PlainTable("Module", title=f"Allocation in {self.file}", title_justify="left")
        table.add_column("Experts", justify="right")
        table.add_column("Ranks", overflow="fold")
        for name, entry in self.found.modules.items():
            ranks = " ".join(map(str, entry["ranks"]))
            table.add_row(name, str(entry["num_experts"]), ranks)
        return table


def guilomo(
    recipe: Recipe,
    out: Path | str,
    *,
    steps: int,
    lr: float,
    selection_lr: float,
    overwrite: bool = False,
) -> SearchResult:
    """Run GuiLoMo's first stage on a recipe and write the allocation.

    Args:
        recipe: its base, its data (validation rows train the selections), the r, num_experts and
            target_modules of its adapter, its batch size and its seed count.
        out: the JSON file to write.
        steps: see `search_guilomo`.
        lr: likewise.
        selection_lr: likewise.
        overwrite: replace the file.

    Raises:
        ConfigError: the recipe cannot be searched for, or `out` is taken.
        DataError: the data is not what a task needs.
        MissingDependencyError: the base or the data is not here and the hub is out of reach.
    """
    check_out_file(out, overwrite=overwrite, is_ours=holds_allocation)
    arguments = training_arguments(recipe, Path(recipe.output_dir))
    config = adapter_config(recipe)
    resolve(recipe.data.tasks)
    processor = load_processor(recipe.model)
    data = load_data(recipe.data, processor, seed=recipe.seed, validation=True)
    assert data.validation is not None
    model = load_model(recipe.model, str(arguments.device))
    set_seed(recipe.seed)
    collator = collator_for(processor)

    def batches(rows: Dataset) -> DataLoader[Any]:
        order = torch.Generator().manual_seed(recipe.seed)
        size = arguments.per_device_train_batch_size
        return DataLoader(rows, size, shuffle=True, generator=order, collate_fn=collator)

    found = search_guilomo(
        model,
        config,
        batches(data.train),
        batches(data.validation),
        steps=steps,
        lr=lr,
        selection_lr=selection_lr,
    )
    write_json(Path(out), found.modules)
    return SearchResult(Path(out), found)


def holds_allocation(path: Path) -> bool:
    """Whether a file is an allocation as this search writes it.

    Raises:
        ConfigError: it holds no JSON.
    """
    content = read_json(path, remedy="run `moelora search` again")
    return bool(content) and all(
        isinstance(entry, dict) and entry.keys() == {"num_experts", "ranks"}
        for entry in content.values()
    )
