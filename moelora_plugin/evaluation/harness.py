"""The part that talks to lm-eval: our tasks in, labels and predictions out.

We call lm-eval's `evaluate`, not the `simple_evaluate` around it, which spends seconds on
collecting the environment, asks git about the current folder (and prints git's "fatal:" where that
is no repository) and reseeds every generator, though scoring log-likelihoods draws nothing. Neither
of its caches is used: `use_cache` is not keyed by model and would report the base's scores as the
adapter's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from .lm import quiet

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
        guess: whether a guess takes the place of an answer that is not found.
        lm_eval: lm-eval's objects for them.
    """

    names: tuple[str, ...]
    tasks: tuple[Task, ...]
    data_dir: str | None
    limit: int | None
    seed: int
    guess: bool
    lm_eval: Any

    @property
    def first_prompt(self) -> str:
        """The context of the first row that will be scored."""
        task = next(iter(self.lm_eval["tasks"].values()))
        context: str = task.task_docs[0]["context"]
        return context

    def categories(self, name: str) -> list[str]:
        """The category of each row of one task."""
        return [document["category"] for document in self.documents(name)]

    def documents(self, name: str) -> list[dict[str, Any]]:
        """The rendered rows of one task, as `loading.load_for_lm_eval` makes them."""
        return list(self.lm_eval["tasks"][PREFIX + name].task_docs)


@dataclass(frozen=True)
class Predictions:
    """What a model answered on one task.

    Attributes:
        label: labels (n,): indices of the right answers, or real numbers for a rating.
        pred: predictions (n,), of the same kind.
        answers: what it answered (n,): the likeliest of the answers, or the text it wrote.
        prompts_sha256: digest of every context and choice that was scored.
    """

    label: Array
    pred: Array
    answers: tuple[str, ...]
    prompts_sha256: str


def load_tasks(
    names: Sequence[str],
    data_dir: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    guess: bool = False,
) -> LoadedTasks:
    """Read and render the rows of tasks.

    Args:
        names: tasks and groups in any spelling.
        data_dir: folder with local parquet files; None reads from the hub.
        limit: rows per task; None takes all.
        seed: of the draw of rows and of the guesses.
        guess: whether a guess takes the place of an answer that is not found.

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
        metadata={"data_dir": data_dir, "limit": limit, "seed": seed, "guess": guess},
    )
    with quiet("lm_eval.api.task"):  # advises every custom_dataset to try the --metadata option
        loaded = manager.load([PREFIX + task.name for task in tasks])
    return LoadedTasks(tuple(names), tuple(tasks), data_dir, limit, seed, guess, loaded)


def predict(
    lm: HFLM, loaded: LoadedTasks, task_ids: Mapping[str, int] | None = None
) -> dict[str, Predictions]:
    """Answer every row of the loaded tasks, one task after the other.

    Args:
        lm: the model.
        loaded: the tasks.
        task_ids: ids by task name, for adapters that route by it.

    Returns:
        Predictions by task name, in the rows' order.
    """
    from lm_eval.evaluator import evaluate

    found = {}
    for task in loaded.tasks:
        key = PREFIX + task.name
        tasks = {**loaded.lm_eval, "tasks": {key: loaded.lm_eval["tasks"][key]}}
        with task_id_of(lm.model, task.name, task_ids):
            results: Any = evaluate(lm, tasks, bootstrap_iters=0)
        found[task.name] = _collect(task, results["samples"][key])
    return found


def task_id_of(
    model: Any, name: str, task_ids: Mapping[str, int] | None
) -> AbstractContextManager[None]:
    """Tell the model which task is going on, where there is an id for it."""
    if not task_ids or name not in task_ids:
        return nullcontext()
    return routing_ids(model, task_id=task_ids[name])


def _collect(task: Task, samples: list[dict[str, Any]]) -> Predictions:
    samples = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    label, pred = np.asarray([sample[SCORE] for sample in samples], dtype=np.float64).T
    digest = hashlib.sha256()
    for sample in samples:
        for context, second, *_ in sample["arguments"]:
            digest.update(f"{context}\0{'' if task.generates else second}\0".encode())
    return Predictions(label, pred, tuple(map(_answer, samples)), digest.hexdigest())


def _answer(sample: dict[str, Any]) -> str:
    """The text that was written, or the likeliest of the answers."""
    responses = sample["filtered_resps"]
    if isinstance(responses[0], str):
        return responses[0]
    best = int(np.argmax([loglikelihood for loglikelihood, _ in responses]))
    return str(sample["doc"]["choices"][best]).strip()
