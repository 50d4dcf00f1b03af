"""The examples of a run: its tasks loaded, rendered, tokenised and mixed."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from datasets import Dataset, concatenate_datasets, interleave_datasets
from transformers import PreTrainedTokenizerBase

from moelora_eval_tasks.catalog import Task, resolve
from moelora_eval_tasks.loading import load_split
from moelora_eval_tasks.prompts import render

from ..clusters import ClusterAssigner, add_cluster_ids
from .examples import build_example
from .recipe import DataSection


@dataclass(frozen=True)
class TaskRows:
    """What one split of one task gave.

    Attributes:
        task: its name in the catalog.
        split: the split that was read.
        revision: the dataset's commit on the hub; None for local files.
        rows: examples made.
        cut_rows: those whose context lost its beginning to `data.max_length`.
    """

    task: str
    split: str
    revision: str | None
    rows: int
    cut_rows: int


@dataclass(frozen=True)
class TrainingData:
    """The examples of a run.

    Attributes:
        train: columns `input_ids`, `labels` and `task_id`, in the order of the mixture. A task's id
            is its place among the recipe's tasks, groups being resolved.
        validation: likewise, or None where the run does not evaluate.
        sources: one entry per task and split.
    """

    train: Dataset
    validation: Dataset | None
    sources: tuple[TaskRows, ...]

    def with_clusters(self, assigner: ClusterAssigner, batch_size: int) -> TrainingData:
        """The same with the column `cluster_id`."""
        train, validation = (
            None if rows is None else add_cluster_ids(rows, assigner, batch_size=batch_size)
            for rows in (self.train, self.validation)
        )
        return replace(self, train=train, validation=validation)

    @property
    def cut_rows(self) -> int:
        """Examples of all splits whose context was cut."""
        return sum(source.cut_rows for source in self.sources)

    def to_dict(self) -> list[dict[str, Any]]:
        """The sources as plain values, for the manifest."""
        return [asdict(source) for source in self.sources]


def load_data(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, *, seed: int, validation: bool
) -> TrainingData:
    """Load a recipe's tasks.

    Args:
        section: the recipe's `data`.
        tokenizer: the base model's.
        seed: chooses the rows where there is a limit, and orders the mixture.
        validation: whether to make the validation examples too.

    Raises:
        ConfigError: a task is unknown.
        DataError: rows are missing or malformed, or an answer is longer than `data.max_length`.
    """
    tasks = resolve(section.tasks)
    load = functools.partial(_load_examples, section=section, tokenizer=tokenizer, seed=seed)
    train = [load(task, index, "train", section.limit) for index, task in enumerate(tasks)]
    held_out = [
        load(task, index, _validation_split(task), section.validation_limit)
        for index, task in enumerate(tasks if validation else [])
    ]
    return TrainingData(
        train=_mix([rows for rows, _ in train], _weights(section.tasks, tasks), seed),
        validation=concatenate_datasets([rows for rows, _ in held_out]) if held_out else None,
        sources=tuple(source for _, source in (*train, *held_out)),
    )


def _load_examples(
    task: Task,
    task_id: int,
    split: str,
    limit: int | None,
    *,
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> tuple[Dataset, TaskRows]:
    """The examples of one split, and what it took to make them."""
    rows = load_split(task, split, data_dir=section.data_dir, limit=limit, seed=seed)
    examples = rows.map(
        lambda row: {
            **build_example(tokenizer, render(task, row), section.max_length),
            "task_id": task_id,
        },
        remove_columns=rows.column_names,
        # Tokenising is quick, and a cache on disk would outlive a change of the prompts.
        load_from_cache_file=False,
        keep_in_memory=True,
        desc=f"Tokenising {task.name} ({split})",
    )
    source = TaskRows(
        task=task.name,
        split=split,
        revision=None if section.data_dir else task.revision,
        rows=len(examples),
        cut_rows=sum(examples["cut"]),
    )
    return examples.remove_columns("cut"), source


def _validation_split(task: Task) -> str:
    """The labelled split to watch while training; never the test split that evaluation scores."""
    return task.eval_split if task.eval_split.startswith("validation") else "validation"


def _weights(tasks: Mapping[str, float] | Sequence[str], resolved: Sequence[Task]) -> list[float]:
    """The sampling weight of each resolved task; empty where the recipe only lists names."""
    if not isinstance(tasks, Mapping):
        return []
    weights = dict.fromkeys((task.name for task in resolved), 0.0)
    for name, weight in tasks.items():
        members = resolve([name])
        for member in members:
            weights[member.name] += weight / len(members)
    return list(weights.values())


def _mix(parts: list[Dataset], weights: list[float], seed: int) -> Dataset:
    """All rows shuffled, or drawn by weight until every row has been drawn once."""
    if not weights:
        return concatenate_datasets(parts).shuffle(seed=seed)
    total = sum(weights)
    return interleave_datasets(
        [part.shuffle(seed=seed) for part in parts],
        probabilities=[weight / total for weight in weights],
        seed=seed,
        stopping_strategy="all_exhausted",
    )
