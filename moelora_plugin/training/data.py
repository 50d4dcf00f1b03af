"""The examples of a run: its tasks loaded, rendered, tokenised and mixed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from datasets import Dataset, concatenate_datasets, interleave_datasets
from torch import Tensor

from moelora_eval_tasks.catalog import Task, resolve
from moelora_eval_tasks.loading import load_split
from moelora_eval_tasks.prompts import render

from ..clusters import ClusterAssigner, add_cluster_ids
from ..errors import ConfigError, DataError
from ..processors import tokenizer_of
from .examples import AnswerCollator, build_example
from .recipe import DataSection
from .vision import Build, VisionCollator, vision_examples

Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]


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
            is its place among the recipe's tasks, groups being resolved. With a vision model also
            `image` and `length`.
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


def load_data(section: DataSection, processor: Any, *, seed: int, validation: bool) -> TrainingData:
    """Load a recipe's tasks.

    Args:
        section: the recipe's `data`.
        processor: the base model's tokenizer or, of a vision model, its processor.
        seed: chooses the rows where there is a limit, and orders the mixture.
        validation: whether to make the validation examples too.

    Raises:
        ConfigError: a task is unknown, or shows images to a model that sees none.
        DataError: rows are missing or malformed, or an answer or an example with an image is longer
            than `data.max_length`.
    """
    tasks = resolve(section.tasks)
    if tokenizer_of(processor) is processor:
        refuse_images(tasks, "the base cannot be shown; choose a vision model with model.name")
    load = functools.partial(_load_examples, section=section, processor=processor, seed=seed)
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
    processor: Any,
    seed: int,
) -> tuple[Dataset, TaskRows]:
    """The examples of one split, and what it took to make them."""
    rows = load_split(task, split, data_dir=section.data_dir, limit=limit, seed=seed)
    build = _builder(processor, section.max_length)
    examples = rows.map(
        lambda row: {
            **build(render(task, row), row[task.image] if task.shows_images else None),
            "task_id": task_id,
        },
        remove_columns=rows.column_names,
        # Tokenising is quick, and a cache on disk would outlive a change of the prompts.
        load_from_cache_file=False,
        keep_in_memory=True,
        desc=f"Tokenising {task.name} ({split})",
    )
    if "length" in examples.column_names:
        _refuse_long(examples, f"{task.name} ({split})", section.max_length)
    source = TaskRows(
        task=task.name,
        split=split,
        revision=None if section.data_dir else task.revision,
        rows=len(examples),
        cut_rows=sum(examples["cut"]),
    )
    return examples.remove_columns("cut"), source


def collator_for(processor: Any) -> Collator:
    """What makes batches of the examples that `load_data` gives with the same processor."""
    tokenizer = tokenizer_of(processor)
    if tokenizer is processor:
        return AnswerCollator(tokenizer.pad_token_id)
    return VisionCollator(processor)


def refuse_images(tasks: Iterable[Task], trouble: str) -> None:
    """Refuse tasks with images where only text is read.

    Args:
        tasks: what the recipe trains on.
        trouble: the end of the sentence: what cannot be done with them, and what to change.

    Raises:
        ConfigError: a task shows images.
    """
    if shown := [task.name for task in tasks if task.shows_images]:
        raise ConfigError(f"data.tasks has {', '.join(shown)}, whose images {trouble}.")


def _builder(processor: Any, max_length: int) -> Build:
    """What makes an example of a rendered row and its image."""
    if tokenizer_of(processor) is not processor:
        return vision_examples(processor, max_length)
    return lambda prompt, image: build_example(processor, prompt, max_length)


def _refuse_long(examples: Dataset, source: str, max_length: int) -> None:
    """Examples with an image cannot be cut; say at once how long the longest is."""
    lengths = examples["length"][:]
    longest = max(lengths)
    if longest > max_length:
        raise DataError(
            f"Row {lengths.index(longest)} of {source} has {longest} tokens with those of its "
            f"image, which are never cut, and data.max_length is {max_length}; raise "
            f"data.max_length to {longest}."
        )


def _validation_split(task: Task) -> str:
    """The labelled split to watch while training.

    Never the test split that evaluation scores. Where it scores another one, that is the only one
    left with labels: GLUE's validation, or the last hundred rows of VMCBench.
    """
    return "validation" if task.eval_split == "test" else task.eval_split


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
