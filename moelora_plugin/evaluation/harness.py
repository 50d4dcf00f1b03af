"""The part that talks to lm-eval: our tasks in, labels and predictions out.

We call lm-eval's `evaluate`, not the `simple_evaluate` around it, which spends seconds on
collecting the environment, asks git about the current folder (and prints git's "fatal:" where that
is no repository) and reseeds every generator, though scoring log-likelihoods draws nothing. Neither
of its caches is used: `use_cache` is not keyed by model and would report the base's scores as the
adapter's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moelora_eval_tasks.catalog import PREFIX, Task, resolve
from moelora_eval_tasks.metrics import Array
from moelora_eval_tasks.scoring import SCORE

from ..call import routing_ids
from ..errors import MissingDependencyError
from .expert_use import ExpertUse, record_expert_use
from .lm.quiet import no_bars, quiet
from .processes import of_first

if TYPE_CHECKING:
    from .lm.shared import SharedLM


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

    def rows(self, name: str) -> int:
        """How many rows of one task there are."""
        return len(self.lm_eval["tasks"][PREFIX + name].task_docs)

    def prompts_sha256(self, task: Task) -> str:
        """Digest of every context, image and choice that is scored."""
        digest = hashlib.sha256()
        for document in self.documents(task.name):
            for choice in [""] if task.generates else document["choices"]:
                digest.update(f"{document['context']}\0{choice}\0".encode())
            digest.update(_image_bytes(document))
        return digest.hexdigest()

    def identity(self, task: Task) -> dict[str, Any]:
        """What the answers to one task follow from, beside the model, as JSON values."""
        digest = hashlib.sha256()
        for document in self.documents(task.name):
            rest = {key: value for key, value in document.items() if key != "image"}
            digest.update(json.dumps(rest, sort_keys=True).encode() + _image_bytes(document))
        config = self.lm_eval["tasks"][PREFIX + task.name].config
        return {
            "task": repr(task),
            "rows": digest.hexdigest(),
            "generation": config.generation_kwargs if task.generates else None,
        }


@dataclass(frozen=True)
class Predictions:
    """What a model answered on one task.

    Attributes:
        label: labels (n,): indices of the right answers, or real numbers for a rating.
        pred: predictions (n,), of the same kind.
        answers: what it answered (n,): the likeliest of the answers, or the text it wrote.
        prompts_sha256: digest of every context, image and choice that was scored.
        expert_use: which experts were used, by layer; empty without a router.
    """

    label: Array
    pred: Array
    answers: tuple[str, ...]
    prompts_sha256: str
    expert_use: ExpertUse = field(default_factory=dict, repr=False)


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
    lm: SharedLM, loaded: LoadedTasks, task: Task, task_id: int | None = None
) -> Predictions:
    """Answer every row of one task, each in one of the processes that share them.

    Args:
        lm: the model.
        loaded: the tasks.
        task: one of them.
        task_id: its id, for an adapter that routes by it.

    Returns:
        The predictions in the rows' order, the same in every process.
    """
    from lm_eval.evaluator import evaluate

    key = PREFIX + task.name
    tasks = {**loaded.lm_eval, "tasks": {key: loaded.lm_eval["tasks"][key]}}
    with (
        _shared(lm, loaded.rows(task.name)),
        task_id_of(lm.model, task_id),
        record_expert_use(lm) as used,
        no_bars(),
    ):
        results: Any = evaluate(lm, tasks, bootstrap_iters=0)
    found: Any = None
    if results is not None:
        digest = loaded.prompts_sha256(task)
        found = _collect(results["samples"][key], digest, used)
    predictions: Predictions = of_first(found, lm.processes)
    return predictions


def task_id_of(model: Any, task_id: int | None) -> AbstractContextManager[None]:
    """Tell the model which task is going on, where there is an id for it."""
    return nullcontext() if task_id is None else routing_ids(model, task_id=task_id)


def _shared(lm: SharedLM, rows: int) -> AbstractContextManager[None]:
    """Let the processes share rows; of fewer rows than processes, each answers all."""
    return nullcontext() if rows >= lm.world_size else lm.alone()


def _collect(samples: list[dict[str, Any]], digest: str, used: ExpertUse) -> Predictions:
    samples = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    label, pred = np.asarray([sample[SCORE] for sample in samples], dtype=np.float64).T
    return Predictions(label, pred, tuple(map(_answer, samples)), digest, used)


def _answer(sample: dict[str, Any]) -> str:
    """The text that was written, or the likeliest of the answers."""
    responses = sample["filtered_resps"]
    if isinstance(responses[0], str):
        return responses[0]
    best = int(np.argmax([loglikelihood for loglikelihood, _ in responses]))
    return str(sample["doc"]["choices"][best]).strip()


def _image_bytes(document: dict[str, Any]) -> bytes:
    """The file of a row's image, as it is."""
    image = document["image"]
    if image is None:
        return b""
    content: bytes | None = image["bytes"]
    return Path(image["path"]).read_bytes() if content is None else content
