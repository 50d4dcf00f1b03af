"""Evaluate an adapter and its base on one load."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from typing import Any

from moelora_eval_tasks.catalog import GROUPS, canonical

from ..errors import ConfigError
from . import provenance
from .applied import require_applied
from .harness import LoadedTasks, load_tasks, predict, task_id_of, wrap
from .report import EvaluationReport
from .request import EvaluationRequest
from .statistics import combine, measure
from .task_ids import trained_task_ids


def evaluate(request: EvaluationRequest) -> EvaluationReport:
    """Load a model once, score it, and write `moelora_eval.json`.

    What can be refused is refused before the model is loaded: tasks, output file, data.

    Raises:
        ConfigError: an unknown task, values that do not go together, an output file that exists.
        DataError: rows that are missing or not what a task needs.
        AdapterError: an adapter that cannot be loaded, or that is loaded and changes nothing.
        MissingDependencyError: lm-eval or the network is not there.
    """
    path = request.output_file()
    loaded = load_tasks(request.tasks, request.data_dir, request.limit, request.seed)
    model, tokenizer = _load_model(request)
    task_ids = None
    if request.adapter is not None:
        task_ids = trained_task_ids(model, request.adapter, loaded.tasks)
    report = _score(model, tokenizer, loaded, request.batch_size, request.compare_base, task_ids)
    details = {**report.details, "request": {**asdict(request), "output": str(path)}}
    if request.adapter is not None:
        details["adapter"] = provenance.adapter_of(request.adapter)
    return replace(report, details=details).write(path)


def evaluate_model(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    data_dir: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    compare_base: bool = False,
    seed: int = 0,
    task_ids: Mapping[str, int] | None = None,
) -> EvaluationReport:
    """Score a model that is in memory; `report.write(path)` saves the outcome.

    Args:
        model: a causal language model, or a PeftModel of one. Its training mode is left as it was.
        tokenizer: its tokenizer.
        tasks: tasks and groups in any spelling.
        data_dir: folder with local parquet files; None reads from the hub.
        limit: rows per task, drawn with `seed`; None takes all.
        batch_size: rows per forward pass.
        compare_base: also score the model with its adapter switched off, on the same rows.
        seed: of the draw of rows and of the bootstrap.
        task_ids: the id of each task by name, for an adapter with the router input "task".

    Raises:
        ConfigError: an unknown task, or `compare_base` of a model without an adapter.
        DataError: rows that are missing or not what a task needs.
        AdapterError: the adapter has trained experts and changes nothing.
        MissingDependencyError: lm-eval or the network is not there.
    """
    loaded = load_tasks(tasks, data_dir, limit, seed)
    return _score(model, tokenizer, loaded, batch_size, compare_base, task_ids)


def _score(
    model: Any,
    tokenizer: Any,
    loaded: LoadedTasks,
    batch_size: int,
    compare_base: bool,
    task_ids: Mapping[str, int] | None,
) -> EvaluationReport:
    """Answer every row with the model, and with its base if asked; then do the statistics."""
    if compare_base and not hasattr(model, "disable_adapter"):
        raise ConfigError(
            f"Cannot compare with a base: a {type(model).__name__} has no adapter to switch off; "
            "leave compare_base out."
        )
    began = datetime.now(timezone.utc)
    clock = time.perf_counter()
    training = model.training
    base = None
    try:
        lm = wrap(model, tokenizer, batch_size)
        with task_id_of(model, loaded.tasks[0].name, task_ids):
            require_applied(model, lm.tok_encode(loaded.first_prompt))
        predictions = predict(lm, loaded, task_ids)
        if compare_base:
            with model.disable_adapter():
                base = predict(lm, loaded)
    finally:
        model.train(training)

    measured = {
        task.name: measure(
            task,
            predictions[task.name].label,
            predictions[task.name].pred,
            None if base is None else base[task.name].pred,
            loaded.seed,
        )
        for task in loaded.tasks
    }
    groups = [name for name in dict.fromkeys(map(canonical, loaded.names)) if name in GROUPS]
    details = {
        **provenance.environment(),
        "request": {
            "tasks": loaded.names,
            "data_dir": loaded.data_dir,
            "limit": loaded.limit,
            "seed": loaded.seed,
            "batch_size": batch_size,
            "compare_base": compare_base,
        },
        "began": began.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - clock, 1),
        "model": provenance.model_of(model),
        "datasets": provenance.datasets_of(loaded.tasks, loaded.data_dir),
    }
    return EvaluationReport(
        tasks=measured,
        groups={group: combine([measured[name] for name in GROUPS[group]]) for group in groups},
        predictions=predictions,
        base_predictions=base,
        details=details,
    )


def _load_model(request: EvaluationRequest) -> tuple[Any, Any]:
    """The adapter on its base, or the base alone."""
    if request.adapter is not None:
        from ..checkpoint import load_adapter

        return load_adapter(
            request.adapter,
            base=request.base,
            dtype=request.dtype,
            device=request.device,
            allow_base_mismatch=request.allow_base_mismatch,
        )

    from transformers import AutoTokenizer

    from ..base_model import load_base_model

    base = str(request.base)  # given, or the request would have been refused
    model = load_base_model(base, dtype=request.dtype, device=request.device)
    try:
        return model, AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{base} holds a model but no tokenizer; save its tokenizer there, or change --base."
        ) from error
