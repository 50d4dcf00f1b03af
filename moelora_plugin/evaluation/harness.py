"""The part that talks to lm-eval: our tasks in, labels and predictions out.

We call lm-eval's `evaluate`, not the `simple_evaluate` around it, which spends seconds on
collecting the environment, asks git about the current folder (and prints git's "fatal:" where that
is no repository) and reseeds every generator, though scoring log-likelihoods draws nothing. Neither
of its caches is used: `use_cache` is not keyed by model and would report the base's scores as the
adapter's.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from moelora_eval_tasks.catalog import PREFIX, Task, resolve
from moelora_eval_tasks.metrics import Array
from moelora_eval_tasks.scoring import SCORE

from ..call import routing_ids
from ..errors import MissingDependencyError

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks whose rows are read and rendered.

    Attributes:
        names: tasks and groups as they were asked for.
        tasks: what they stand for.
        data_dir: where the rows came from; None is the hub.
        limit: rows drawn per task; None took all.
        seed: of that draw, and of what else is drawn in the run.
        lm_eval: lm-eval's objects for them.
    """

    names: tuple[str, ...]
    tasks: tuple[Task, ...]
    data_dir: str | None
    limit: int | None
    seed: int
    lm_eval: Any

    @property
    def first_prompt(self) -> str:
        """The context of the first row that will be scored."""
        task = next(iter(self.lm_eval["tasks"].values()))
        context: str = task.task_docs[0]["context"]
        return context


@dataclass(frozen=True)
class Predictions:
    """What a model answered on one task.

    Attributes:
        label: labels (n,): indices of the right answers, or real numbers for a rating.
        pred: predictions (n,), of the same kind.
        prompts_sha256: digest of every context and choice that was scored.
    """

    label: Array
    pred: Array
    prompts_sha256: str


def load_tasks(
    names: Sequence[str], data_dir: str | None = None, limit: int | None = None, seed: int = 0
) -> LoadedTasks:
    """Read and render the rows of tasks.

    Args:
        names: tasks and groups in any spelling.
        data_dir: folder with local parquet files; None reads from the hub.
        limit: rows per task; None takes all.
        seed: of the draw of rows.

    Raises:
        ConfigError: an unknown task, or a limit below 1.
        DataError: rows that are missing or not what a task needs.
        MissingDependencyError: lm-eval or the network is not there.
    """
    tasks = resolve(names)
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingDependencyError(
            f"Evaluation needs lm-eval, which cannot be imported ({error}); "
            "run pip install 'moelora[eval]'."
        ) from error
    if not hasattr(TaskManager, "load"):
        raise MissingDependencyError(
            f"Evaluation needs lm-eval 0.4.13 or newer, and {version('lm_eval')} is installed; run "
            "pip install 'moelora[eval]', in an environment of its own where a training program "
            "pins lm-eval."
        )

    manager = TaskManager(
        include_path=str(files("moelora_eval_tasks")),
        include_defaults=False,  # indexing lm-eval's own 14,000 tasks takes 20 seconds
        metadata={"data_dir": data_dir, "limit": limit, "seed": seed},
    )
    with _quiet("lm_eval.api.task"):  # advises every custom_dataset to try the --metadata option
        loaded = manager.load([PREFIX + task.name for task in tasks])
    return LoadedTasks(tuple(names), tuple(tasks), data_dir, limit, seed, loaded)


def wrap(model: Any, tokenizer: Any, batch_size: int) -> HFLM:
    """lm-eval's view of a model in memory."""
    from lm_eval.models.huggingface import HFLM

    with _quiet("lm_eval.models.huggingface"):  # warns that the model was not loaded by lm-eval
        return HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # lm-eval sets a pad token where there is none
            batch_size=batch_size,
            softmax_dtype="float32",  # in bf16 two answers would often tie
        )


def predict(
    lm: HFLM, loaded: LoadedTasks, task_ids: Mapping[str, int] | None = None
) -> dict[str, Predictions]:
    """Answer every row of the loaded tasks.

    Args:
        lm: the model.
        loaded: the tasks.
        task_ids: ids by task name, for adapters that route by it. Tasks are then scored one after
            the other, because lm-eval mixes their rows in its batches.

    Returns:
        Predictions by task name, in the rows' order.
    """
    if not task_ids:
        return _predict(lm, loaded.lm_eval)
    found: dict[str, Predictions] = {}
    for key, task in loaded.lm_eval["tasks"].items():
        with task_id_of(lm.model, key.removeprefix(PREFIX), task_ids):
            found |= _predict(lm, {**loaded.lm_eval, "tasks": {key: task}})
    return found


def task_id_of(
    model: Any, name: str, task_ids: Mapping[str, int] | None
) -> AbstractContextManager[None]:
    """Tell the model which task is going on, where there is an id for it."""
    if not task_ids or name not in task_ids:
        return nullcontext()
    return routing_ids(model, task_id=task_ids[name])


def _predict(lm: HFLM, tasks: Any) -> dict[str, Predictions]:
    from lm_eval.evaluator import evaluate

    results: Any = evaluate(lm, tasks, bootstrap_iters=0)
    return {
        name.removeprefix(PREFIX): _collect(samples) for name, samples in results["samples"].items()
    }


def _collect(samples: list[dict[str, Any]]) -> Predictions:
    samples = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    label, pred = np.asarray([sample[SCORE] for sample in samples], dtype=np.float64).T
    digest = hashlib.sha256()
    for sample in samples:
        for context, choice in sample["arguments"]:
            digest.update(f"{context}\0{choice}\0".encode())
    return Predictions(label, pred, digest.hexdigest())


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Hide the warnings of one logger."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
