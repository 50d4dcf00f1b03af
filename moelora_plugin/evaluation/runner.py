"""Evaluate adapters and their base on one load."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from moelora_eval_tasks.catalog import GROUPS, canonical

from ..errors import ConfigError
from . import provenance
from .applied import require_applied
from .harness import LoadedTasks, Predictions, load_tasks, predict, task_id_of
from .lm import wrap
from .report import EvaluationReport
from .request import EvaluationRequest
from .statistics import combine, measure
from .subjects import BASE, subjects

MODEL = "model"  # the name, in a report, of a model that is in memory


def evaluate(request: EvaluationRequest) -> EvaluationReport:
    """Load the base once, score it and each adapter, and write `moelora_eval.json`.

    What can be refused is refused before the model is loaded: tasks, output file, data.

    Raises:
        ConfigError: an unknown task, values that do not go together, an output file that exists.
        DataError: rows that are missing or not what a task needs.
        AdapterError: an adapter that cannot be loaded, or that is loaded and changes nothing.
        MissingDependencyError: lm-eval or the network is not there.
    """
    path = request.output_file()
    loaded = load_tasks(request.tasks, request.data_dir, request.limit, request.seed, request.guess)
    clock = _Clock()
    found: dict[str, dict[str, Predictions]] = {}
    models: dict[str, Mapping[str, Any]] = {}
    for one in subjects(request, loaded.tasks):
        found[one.name] = _answer(
            one.model, one.processor, loaded, request.batch_size, one.task_ids
        )
        models[one.name] = one.record
    reference = BASE if request.compare_base else None
    report = _summarise(
        loaded,
        found,
        reference,
        models,
        {**clock.read(), "request": {**asdict(request), "output": str(path)}},
    )
    return report.write(path)


def evaluate_model(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    data_dir: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    compare_base: bool = False,
    guess: bool = False,
    seed: int = 0,
    task_ids: Mapping[str, int] | None = None,
) -> EvaluationReport:
    """Score a model that is in memory; `report.write(path)` saves the outcome.

    Args:
        model: a causal language model, or a PeftModel of one. Its training mode is left as it was.
        tokenizer: its tokenizer or, of a vision model, its processor.
        tasks: tasks and groups in any spelling.
        data_dir: folder with local parquet files; None reads from the hub.
        limit: rows per task, drawn with `seed`; None takes all.
        batch_size: rows per forward pass.
        compare_base: also score the model with its adapter switched off, on the same rows.
        guess: where a written answer is not found, guess one with `seed`; else that is a miss.
        seed: of the draw of rows, of the guesses and of the bootstrap.
        task_ids: the id of each task by name, for an adapter with the router input "task".

    Returns:
        The scores of "model" and, where it was compared, of "base".

    Raises:
        ConfigError: an unknown task, or `compare_base` of a model without an adapter.
        DataError: rows that are missing or not what a task needs.
        AdapterError: the adapter has trained experts and changes nothing.
        MissingDependencyError: lm-eval or the network is not there.
    """
    loaded = load_tasks(tasks, data_dir, limit, seed, guess)
    if compare_base and not hasattr(model, "disable_adapter"):
        raise ConfigError(
            f"Cannot compare with a base: a {type(model).__name__} has no adapter to switch off; "
            "leave compare_base out."
        )
    clock = _Clock()
    found: dict[str, dict[str, Predictions]] = {}
    if compare_base:
        with model.disable_adapter():
            found[BASE] = _answer(model, tokenizer, loaded, batch_size, {}, is_base=True)
    found[MODEL] = _answer(model, tokenizer, loaded, batch_size, task_ids or {})
    request = {
        "tasks": loaded.names,
        "data_dir": data_dir,
        "limit": limit,
        "seed": seed,
        "batch_size": batch_size,
        "compare_base": compare_base,
        "guess": guess,
    }
    return _summarise(
        loaded,
        found,
        BASE if compare_base else None,
        {MODEL: provenance.model_of(model)},
        {**clock.read(), "request": request},
    )


def _answer(
    model: Any,
    processor: Any,
    loaded: LoadedTasks,
    batch_size: int,
    task_ids: Mapping[str, int],
    *,
    is_base: bool = False,
) -> dict[str, Predictions]:
    """Answer every row with one model, and leave it in the mode that it was in."""
    training = model.training
    try:
        lm = wrap(model, processor, batch_size)
        if not is_base:
            with task_id_of(model, loaded.tasks[0].name, task_ids):
                require_applied(model, lm.tok_encode(loaded.first_prompt))
        return predict(lm, loaded, task_ids)
    finally:
        model.train(training)


def _summarise(
    loaded: LoadedTasks,
    found: dict[str, dict[str, Predictions]],
    reference: str | None,
    models: dict[str, Mapping[str, Any]],
    details: dict[str, Any],
) -> EvaluationReport:
    """The statistics of what the models answered, and what else belongs into the report."""
    measured = {}
    for task in loaded.tasks:
        by_model = {model: answers[task.name] for model, answers in found.items()}
        first = next(iter(by_model.values()))
        measured[task.name] = measure(
            task,
            first.label,
            {model: one.pred for model, one in by_model.items()},
            reference,
            loaded.seed,
            None if task.category is None else loaded.categories(task.name),
        )
    groups = [name for name in dict.fromkeys(map(canonical, loaded.names)) if name in GROUPS]
    return EvaluationReport(
        tasks=measured,
        groups={group: combine([measured[name] for name in GROUPS[group]]) for group in groups},
        predictions=found,
        reference=reference,
        models=models,
        details={
            **provenance.environment(),
            **details,
            "datasets": provenance.datasets_of(loaded.tasks, loaded.data_dir),
        },
    )


class _Clock:
    """When a run began and how long it took."""

    def __init__(self) -> None:
        self._began = datetime.now(timezone.utc)
        self._start = time.perf_counter()

    def read(self) -> dict[str, Any]:
        """For the report."""
        return {
            "began": self._began.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self._start, 1),
        }
