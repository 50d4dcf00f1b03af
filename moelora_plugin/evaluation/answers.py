"""Having models answer tasks, one after the other, with a cache and in sight of the user."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import PartialState

from moelora_eval_tasks.catalog import Task
from moelora_eval_tasks.metrics import METRICS

from .applied import require_applied
from .cache import PredictionCache
from .harness import LoadedTasks, Predictions, predict, task_id_of
from .lm import wrap
from .processes import of_first
from .progress import EvaluationProgress
from .subjects import BASE

if TYPE_CHECKING:
    from .lm.shared import SharedLM


class Answers:
    """The answers of several models to the same tasks.

    Attributes:
        loaded: the tasks.
        found: the predictions by model and task.
    """

    def __init__(
        self,
        loaded: LoadedTasks,
        batch_size: int | str,
        models: int,
        processes: PartialState | None = None,
    ) -> None:
        """Expect so many models; `processes` share the rows."""
        self.loaded = loaded
        self.found: dict[str, dict[str, Predictions]] = {}
        self._batch_size = batch_size
        self._processes = processes
        self._began = datetime.now(timezone.utc)
        self._start = time.perf_counter()
        self._sizes: dict[str, dict[str, int]] = {}
        self._from_cache: dict[str, list[str]] = {}
        self._kept = 0
        self._progress = EvaluationProgress(
            models * sum(loaded.rows(task.name) for task in loaded.tasks),
            is_shown=processes is None or processes.is_main_process,
        )

    def __enter__(self) -> Answers:
        self._progress.start()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._progress.stop()
        if kind is KeyboardInterrupt:
            kept = f"the cache has {self._kept} finished tasks, and the same command goes on there"
            self._progress.say(f"Interrupted; {kept if self._kept else 'nothing is kept'}.")

    def add(
        self,
        name: str,
        model: Any,
        processor: Any,
        task_ids: Mapping[str, int] | None = None,
        cache: PredictionCache | None = None,
    ) -> None:
        """Have a model answer every row, and leave it in the mode that it was in.

        Args:
            name: of the model.
            model: the model.
            processor: its tokenizer or processor.
            task_ids: ids by task name, for an adapter that routes by it.
            cache: of this model's answers; None keeps none.

        Raises:
            AdapterError: its adapter has trained experts and changes nothing.
        """
        training = model.training
        ids = task_ids or {}
        self.found[name], self._sizes[name], self._from_cache[name] = {}, {}, []
        try:
            lm = wrap(model, processor, self._batch_size, self._processes)
            if name != BASE:
                with task_id_of(model, ids.get(self.loaded.tasks[0].name)):
                    require_applied(model, lm.tok_encode(self.loaded.first_prompt))
            for task in self.loaded.tasks:
                self._add_task(name, lm, task, ids.get(task.name), cache)
        finally:
            model.train(training)

    def record(self) -> dict[str, Any]:
        """For the report: when, how long, in what batches, and what was in the cache."""
        return {
            "began": self._began.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self._start, 1),
            "processes": 1 if self._processes is None else self._processes.num_processes,
            "batch_sizes": self._sizes,
            "from_cache": self._from_cache,
        }

    def _add_task(
        self,
        name: str,
        lm: SharedLM,
        task: Task,
        task_id: int | None,
        cache: PredictionCache | None,
    ) -> None:
        start, rows = time.perf_counter(), self.loaded.rows(task.name)
        with self._progress.task(name, task.name, rows) as lm.advance:
            identity = {**self.loaded.identity(task), "task_id": task_id} if cache else {}
            kept = of_first(cache.read(identity) if cache else None, self._processes)
            predictions = kept or predict(lm, self.loaded, task, task_id)
        if kept:
            self._from_cache[name].append(task.name)
        else:
            self._sizes[name][task.name] = lm.batch_size
        if cache and lm.rank == 0:
            self._kept += bool(kept) or cache.write(identity, predictions)
        self.found[name][task.name] = predictions
        score = np.mean(
            [METRICS[metric](predictions.label, predictions.pred) for metric in task.scored]
        )
        source = "from the cache" if kept else f"{time.perf_counter() - start:.1f} s"
        self._progress.say(f"{name}  {task.name}  {100 * score:.2f}  ({rows} rows, {source})")
