"""Rows of a task, from the hub or from a local folder, checked before anything is computed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelora_plugin.errors import ConfigError, DataError, MissingDependencyError, first_line

from . import images
from .catalog import TASKS
from .parsing import MISS
from .prompts import gold, render
from .task import Task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

UNLABELLED = (None, "", -1)  # what the hub's test splits have in place of a label
EVALUATION = "evaluation"  # the one split of what lm-eval gets


def load_split(
    task: Task,
    split: str,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Load one split of a task.

    Args:
        task: an entry of the catalog.
        split: "train" is what the task is trained on (its `train_split` and `train_slice`),
            `task.eval_split` what it is scored on (of its `eval_slice`), any other name a whole
            split of the hub's.
        data_dir: folder with `<task.folder>/<split>.parquet`; None loads from the hub, at the
            task's pinned revision.
        limit: rows to keep, drawn without replacement and left in their order; None keeps all.
        seed: seed of that draw.

    Returns:
        The rows, with the columns `task.columns`: those with an image or those without, where the
        task has only the ones or the others, and of them the slice that the task has.

    Raises:
        DataError: a file or column is missing, the split has no labels, a label is unknown, the
            slice is empty, or an image is missing or cannot be decoded.
        MissingDependencyError: the hub does not answer, or Pillow is not installed.
        ConfigError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}, expected at least 1; leave --limit out for all rows.")
    rows = {"train": task.train_slice, task.eval_split: task.eval_slice}.get(split, ":")
    dataset = (_pooled if task.parts else _checked)(task, split, data_dir)
    chosen: Sequence[int] = range(len(dataset))[parse_slice(rows)]
    if not chosen:
        raise DataError(
            f"Split {split!r} of {task.name} has {len(dataset)} rows, of which it takes [{rows}]; "
            "that leaves none, so change --data-dir or --tasks."
        )
    if limit is not None and limit < len(chosen):
        chosen = sorted(random.Random(seed).sample(chosen, limit))
    if len(chosen) < len(dataset):
        dataset = dataset.select(chosen)
    if task.image and task.shows_images:
        images.check(dataset[task.image], chosen, f"{task.name}, split {split!r}")
    return dataset


def load_for_lm_eval(
    task_name: str,
    data_dir: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    guess: bool = False,
    **_: Any,
) -> DatasetDict:
    """Rendered rows, as lm-eval's `custom_dataset` hook wants them.

    lm-eval calls it with a YAML file's `dataset_kwargs` and with all its metadata: what we put
    there (data_dir, limit, seed, guess) and what is not for us (version, config_source, model
    arguments).

    Returns:
        One split, "evaluation", with the columns task, context, choices, gold, options, category,
        image (None, or as in `images`), label and guess: the prediction where a written
        answer is not found, MISS or with `guess` one of the row's answers, drawn with `seed`.
    """
    from datasets import Dataset, DatasetDict

    task = TASKS[task_name]
    categories = dict(task.categories)
    rng = random.Random(f"{task.name} {seed}")
    docs = []
    for row in load_split(task, task.eval_split, data_dir, limit, seed):
        prompt = render(task, row)
        category = None if task.category is None else str(row[task.category])
        docs.append(
            {
                "task": task.name,
                "context": prompt.context,
                "choices": list(prompt.choices),
                "gold": prompt.gold,
                "options": list(prompt.options),
                "category": categories.get(category, category) if category else None,
                "image": row[task.image] if task.shows_images else None,
                "label": float(row[task.label] if task.rating == "mean" else prompt.gold),
                "guess": rng.randrange(len(prompt.choices)) if guess else MISS,
            }
        )
    return DatasetDict({EVALUATION: Dataset.from_list(docs)})


def parse_slice(text: str) -> slice:
    """Python's notation of a slice ("900:", "::40")."""
    return slice(*(int(part) if part else None for part in text.split(":")))


def _checked(task: Task, split: str, data_dir: str | Path | None) -> Dataset:
    """The rows of a task's own dataset, with the columns it needs and labels it knows."""
    if split == "train":
        if task.train_split is None:
            raise DataError(
                f"{task.name} has no rows to train on, as all that have labels are scored; leave "
                "it out of data.tasks."
            )
        split = task.train_split
    if data_dir is None:
        dataset, source, folder = _from_hub(task, split), f"{task.hub_id} on the hub", Path()
    else:
        path = local_file(task, split, data_dir)
        dataset, source, folder = _from_file(task, path), str(path), path.parent
    dataset = dataset.rename_columns(
        {
            old: new
            for old, new in task.renamed
            if old in dataset.column_names and new not in dataset.column_names
        }
    )
    needed = tuple(dict.fromkeys((*task.columns, *((task.image,) if task.image else ()))))
    if missing := [column for column in needed if column not in dataset.column_names]:
        raise DataError(
            f"Column {missing[0]!r} is missing in {source}, which has "
            f"{', '.join(dataset.column_names)}; {task.name} expects {', '.join(needed)}."
        )
    if task.image:
        dataset = images.locate(dataset, task.image, folder)
        dataset = _by_image(dataset, task.image, with_image=task.shows_images)
    dataset = dataset.select_columns(list(task.columns))
    _check_labels(task, dataset, split, source)
    return dataset


def _pooled(task: Task, split: str, data_dir: str | Path | None) -> Dataset:
    """The rows of a task's parts, one after the other; a column that a part lacks is empty.

    Parts that share a split (both halves of MNLI's validation go with one train) give it once.
    """
    from datasets import concatenate_datasets

    parts = {}
    for part in (TASKS[name] for name in task.parts):
        own = part.eval_split if split == task.eval_split else split
        if (part.folder, own) not in parts:
            try:
                parts[part.folder, own] = _checked(part, own, data_dir)
            except DataError as error:
                said = str(error).removesuffix(".")
                raise DataError(f"{said} (as a part of {task.name}).") from error
    return concatenate_datasets(list(parts.values())).select_columns(list(task.columns))


def local_file(task: Task, split: str, data_dir: str | Path) -> Path:
    """The file of one split in a data folder.

    Raises:
        DataError: it is not there.
    """
    path = Path(data_dir) / task.folder / f"{split}.parquet"
    if path.is_file():
        return path
    if not Path(data_dir).is_dir():
        raise DataError(
            f"Data folder {data_dir} does not exist; --data-dir expects a folder with "
            f"{task.folder}/{split}.parquet in it."
        )
    found = sorted(file.stem for file in path.parent.glob("*.parquet"))
    raise DataError(
        f"{path} does not exist (found there: {', '.join(found) or 'nothing'}); "
        f"{task.name} needs it, so add it or change --data-dir or --tasks."
    )


def _from_file(task: Task, path: Path) -> Dataset:
    """Read a parquet file into memory; unlike `Dataset.from_parquet`, nothing is cached on disk."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    try:
        return Dataset(pq.read_table(path))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a parquet file that can be read ({first_line(error)}); "
            f"replace it with the {path.stem} split of {task.name}."
        ) from error


def _from_hub(task: Task, split: str) -> Dataset:
    """Fetch a split at the task's pinned revision."""
    import datasets

    if task.hub_id is None:
        raise DataError(
            f"{task.name} is not on the hub; make its files with `moelora data prepare "
            f"{task.folder} --from DIR --out DATA` and pass --data-dir DATA."
        )
    try:
        return datasets.load_dataset(task.hub_id, task.config, split=split, revision=task.revision)
    except OSError as error:  # no network, offline mode, no such dataset
        raise MissingDependencyError(
            f"Cannot fetch {task.hub_id} from the hub ({first_line(error)}); pass --data-dir with "
            f"a folder that has {task.folder}/{split}.parquet in it."
        ) from error
    except ValueError as error:  # no such split or configuration
        raise DataError(
            f"{task.hub_id} on the hub has no split {split!r} for {task.name} "
            f"({first_line(error)}); use 'train' or {task.eval_split!r}."
        ) from error


def _by_image(dataset: Dataset, column: str, *, with_image: bool) -> Dataset:
    """The rows that have an image, or those that have none.

    Works on Arrow's validity bits: no image is decoded.
    """
    import numpy as np

    found = dataset.data.column(column)
    return dataset.select(np.flatnonzero(found.is_valid() if with_image else found.is_null()))


def _check_labels(task: Task, dataset: Dataset, split: str, source: str) -> None:
    """Refuse a split that is empty, has no labels, or has labels the task does not know."""
    labels = dataset[task.label][:]  # a list: the column itself reads the rows at each pass
    if not len(dataset):
        kind = "with an image" if task.shows_images else "for this task"
        raise DataError(
            f"Split {split!r} of {task.name} in {source} has no rows {kind}; change --data-dir or "
            "--tasks."
        )
    if unlabelled := sum(label in UNLABELLED for label in labels):
        raise DataError(
            f"Split {split!r} of {task.name} in {source} has no label in {unlabelled} of its "
            f"{len(dataset)} rows; use a labelled split: 'train' or {task.eval_split!r}."
        )
    try:
        if task.labels:  # one row of each label is enough
            for label in set(labels):
                gold(task, dict.fromkeys(task.columns) | {task.label: label})
        else:
            for row in dataset:
                gold(task, row)
    except DataError as error:
        raise DataError(f"{str(error).removesuffix('.')} (in {source}, split {split!r}).") from None
