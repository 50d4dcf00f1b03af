"""How many of the rows that are scored an adapter was trained on.

Rows are the same where all that a model is shown of them is: texts, options and image, whatever the
protocol they are shown under. The manifest of an adapter holds its recipe, with which its training
rows are drawn once more from the data that the evaluation reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from moelora_eval_tasks.catalog import TASKS, Task
from moelora_eval_tasks.loading import load_split

from ..checkpoint import read_manifest, resolve_adapter
from ..errors import MoeLoraError
from ..manifest import RecipeRecord, training_of
from .harness import LoadedTasks

if TYPE_CHECKING:
    from datasets import Dataset

Overlap = Mapping[str, Mapping[str, int | None]]


def count_overlap(loaded: LoadedTasks, adapters: Mapping[str, str]) -> Overlap:
    """Count the scored rows that each adapter was trained on.

    Args:
        loaded: what is scored.
        adapters: path or hub id of each adapter, by the model's name.

    Returns:
        By model and task a number of rows; None where it is not known, as moelora did not train the
        adapter, or the rows that it was trained on are not at hand.
    """
    return {
        model: {task.name: _count(loaded, task, manifest) for task in loaded.tasks}
        for model, path in adapters.items()
        for manifest in [read_manifest(resolve_adapter(path))]
    }


def overlap_warnings(overlap: Overlap) -> list[str]:
    """What a reader must know of it, a sentence each; none where no row was trained on."""
    trained = _listed(overlap, lambda rows: f" ({rows})" if rows else None)
    unknown = _listed(overlap, lambda rows: "" if rows is None else None)
    return [
        *([f"Rows scored that were trained on (how many): {trained}."] if trained else []),
        *([f"Not known whether rows scored were trained on: {unknown}."] if unknown else []),
    ]


def _listed(overlap: Overlap, show: Callable[[int | None], str | None]) -> str:
    """The tasks that `show` shows: "adapter on sst2 (3), rte (1); other on rte (2)"."""
    lists = []
    for model, by_task in overlap.items():
        shown = [name + text for name, rows in by_task.items() if (text := show(rows)) is not None]
        if shown:
            lists.append(f"{model} on {', '.join(shown)}")
    return "; ".join(lists)


def _count(loaded: LoadedTasks, task: Task, manifest: Mapping[str, Any]) -> int | None:
    training = training_of(manifest)
    if training.recipe is None:
        return None
    trained: set[tuple[str, ...]] = set()
    for source in training.data:
        other = TASKS.get(source.task)
        if other is None:
            return None
        if source.split == "train" and _same_dataset(task, other):
            rows = _training_rows(other, loaded.data_dir, training.recipe)
            if rows is None or len(rows) != source.rows:
                return None
            trained.update(_shown(rows, task, other))
    if not trained:
        return 0
    scored = load_split(task, task.eval_split, loaded.data_dir, loaded.limit, loaded.seed)
    return sum(row in trained for row in _shown(scored, task, task))


def _training_rows(task: Task, data_dir: str | None, recipe: RecipeRecord) -> Dataset | None:
    """The rows that a recipe takes of a task; None where they are not at hand."""
    try:
        return load_split(task, "train", data_dir, recipe.data.limit, recipe.seed)
    except MoeLoraError:  # no training split in this data folder, or no answer from the hub
        return None


def _same_dataset(task: Task, other: Task) -> bool:
    one, two = ((of.hub_id, of.config) for of in (task, other))
    return task.benchmark == other.benchmark or one == two


def _shown(rows: Dataset, task: Task, of: Task) -> list[tuple[str, ...]]:
    """What `task` shows of each row of the task `of`."""
    texts = [
        [str(value).strip() for value in rows[column][:]]
        for column in (*(column for _, column in task.inputs), *task.options)
    ]
    pictures = map(_digest, rows[of.image][:]) if of.shows_images else [""] * len(rows)
    return list(zip(*texts, pictures, strict=True))


def _digest(image: Mapping[str, Any] | None) -> str:
    """Of an image as rows have it, see `moelora_eval_tasks.images`."""
    if image is None:
        return ""
    return hashlib.sha256(image["bytes"] or image["path"].encode()).hexdigest()
