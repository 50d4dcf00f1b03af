"""Evaluate adapters and their base on one load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from moelora_eval_tasks.catalog import GROUPS, canonical

from ..checkpoint import read_manifest, resolve_adapter
from ..errors import ConfigError
from . import provenance
from .answers import Answers
from .cache import PredictionCache
from .harness import load_tasks
from .images import refuse_images
from .overlap import count_overlap
from .processes import launched
from .report import EvaluationReport
from .request import AUTO, EvaluationRequest, check_batch_size
from .statistics import combine, measure
from .subjects import BASE, adapter_names, subjects

MODEL = "model"  # the name, in a report, of a model that is in memory


def evaluate(request: EvaluationRequest) -> EvaluationReport:
    """Load the base once, score it and each adapter, and write `moelora_eval.json`.

    Processes that were launched together share the rows; each gets the report, and the first
    writes it. Answers are kept and, where they are there, not asked for again (`cache`).

    What can be refused is refused before the model is loaded: tasks, output file, data.

    Raises:
        ConfigError: an unknown task, values that do not go together, an output file that exists.
        DataError: rows that are missing or not what a task needs.
        AdapterError: an adapter that cannot be loaded, or that is loaded and changes nothing.
        MissingDependencyError: lm-eval or the network is not there.
    """
    path = request.output_file()
    processes = launched(request.device)
    loaded = load_tasks(request.tasks, request.data_dir, request.limit, request.seed, request.guess)
    for adapter in request.adapters:  # `count_overlap` reads it when all is scored
        read_manifest(resolve_adapter(adapter))
    models: dict[str, Mapping[str, Any]] = {}
    count = len(request.adapters) + (request.compare_base or not request.adapters)
    device = request.device if processes is None else str(processes.device)
    with Answers(loaded, request.batch_size, count, processes) as answers:
        for one in subjects(request, loaded.tasks, device):
            cache = PredictionCache(one.identity) if request.cache and one.identity else None
            answers.add(one.name, one.model, one.processor, one.task_ids, cache)
            models[one.name] = one.record
            del one  # or the next would have to share the memory with it
    reference = BASE if request.compare_base else None
    adapters = {name: adapter for adapter, name in adapter_names(request.adapters).items()}
    details = {
        "request": {**asdict(request), "output": str(path)},
        "overlap": count_overlap(loaded, adapters),
    }
    report = _summarise(answers, reference, models, details)
    return report.write(path) if processes is None or processes.is_main_process else report


def evaluate_model(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    data_dir: str | None = None,
    limit: int | None = None,
    batch_size: int | str = AUTO,
    compare_base: bool = False,
    guess: bool = False,
    seed: int = 0,
    task_ids: Mapping[str, int] | None = None,
) -> EvaluationReport:
    """Score a model that is in memory; `report.write(path)` saves the outcome.

    Nothing is kept in the cache, and a process does not share the rows with others.

    Args:
        model: a language model, a vision model, or a PeftModel of one. Its training mode is left
            as it was.
        tokenizer: its tokenizer or, of a vision model, its processor.
        tasks: tasks and groups in any spelling.
        data_dir: folder with local parquet files; None reads from the hub.
        limit: rows per task, drawn with `seed`; None takes all.
        batch_size: rows per forward pass; "auto" takes as many as fill it with tokens and fit.
        compare_base: also score the model with its adapter switched off, on the same rows.
        guess: where a written answer is not found, guess one with `seed`; else that is a miss.
        seed: of the draw of rows, of the guesses and of the bootstrap.
        task_ids: the id of each task by name, for an adapter with the router input "task".

    Returns:
        The scores of "model" and, where it was compared, of "base".

    Raises:
        ConfigError: an unknown task, `compare_base` of a model without an adapter, or a task with
            images for a model without eyes.
        DataError: rows that are missing or not what a task needs.
        AdapterError: the adapter has trained experts and changes nothing.
        MissingDependencyError: lm-eval or the network is not there.
    """
    check_batch_size(batch_size)
    loaded = load_tasks(tasks, data_dir, limit, seed, guess)
    refuse_images(model, loaded.tasks)
    if compare_base and not hasattr(model, "disable_adapter"):
        raise ConfigError(
            f"Cannot compare with a base: a {type(model).__name__} has no adapter to switch off; "
            "leave compare_base out."
        )
    with Answers(loaded, batch_size, 1 + compare_base) as answers:
        if compare_base:
            with model.disable_adapter():
                answers.add(BASE, model, tokenizer)
        answers.add(MODEL, model, tokenizer, task_ids)
    request = {
        "tasks": loaded.names,
        "data_dir": data_dir,
        "limit": limit,
        "seed": seed,
        "batch_size": batch_size,
        "compare_base": compare_base,
        "guess": guess,
    }
    models = {MODEL: provenance.model_of(model)}
    return _summarise(answers, BASE if compare_base else None, models, {"request": request})


def _summarise(
    answers: Answers,
    reference: str | None,
    models: Mapping[str, Mapping[str, Any]],
    details: dict[str, Any],
) -> EvaluationReport:
    """The statistics of what the models answered, and what else belongs into the report."""
    record = answers.record()  # before the statistics, which take their time too
    loaded, found = answers.loaded, answers.found
    measured = {}
    for task in loaded.tasks:
        by_model = {model: by_task[task.name] for model, by_task in found.items()}
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
        models=dict(models),
        details={
            **provenance.environment(),
            **record,
            **details,
            "datasets": provenance.datasets_of(loaded.tasks, loaded.data_dir),
            "protocols": provenance.settings_of(loaded),
        },
        documents=loaded.documents,
    )
