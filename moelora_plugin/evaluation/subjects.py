"""The models of one evaluation, one after the other on a single load of the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from moelora_eval_tasks.catalog import Task

from ..base_model import load_base_model
from ..checkpoint import check_adapter, load_adapter, read_adapter_config, resolve_adapter
from ..errors import ConfigError
from . import provenance
from .request import EvaluationRequest
from .task_ids import trained_task_ids

BASE = "base"  # the name of the base among the models of a report


@dataclass(frozen=True)
class Subject:
    """One model to score.

    Attributes:
        name: in the report.
        model: the model; valid until the next subject is asked for.
        processor: its tokenizer or, of a vision model, its processor.
        record: what the report says of it.
        task_ids: ids by task, where its adapter routes by them.
    """

    name: str
    model: Any
    processor: Any
    record: Mapping[str, Any]
    task_ids: Mapping[str, int] = field(default_factory=dict)


def subjects(request: EvaluationRequest, tasks: Sequence[Task]) -> Iterator[Subject]:
    """The base, if it is asked for, and then each adapter on it.

    Raises:
        ConfigError: adapters for different bases, or a base without a tokenizer.
        AdapterError: an adapter that cannot be loaded.
        MissingDependencyError: a model is not here and the hub cannot be reached.
    """
    for path in request.adapters:  # before the time that loading a base takes
        check_adapter(path, request.base, allow_base_mismatch=request.allow_base_mismatch)
    base_name = request.base or _common_base(request.adapters)
    base = load_base_model(base_name, dtype=request.dtype, device=request.device).eval()
    if request.compare_base or not request.adapters:
        yield Subject(BASE, base, _tokenizer(base_name), provenance.model_of(base))
    for path, name in adapter_names(request.adapters).items():
        model, tokenizer = load_adapter(
            path, base=base, allow_base_mismatch=request.allow_base_mismatch
        )
        record = {**provenance.model_of(model), **provenance.adapter_of(path)}
        yield Subject(name, model, tokenizer, record, trained_task_ids(model, path, tasks))
        base = model.unload()


def adapter_names(paths: Sequence[str]) -> dict[str, str]:
    """For each path the shortest end of it that tells it from the others ("a/adapter")."""
    parts = {path: Path(path).parts for path in paths}
    for length in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {path: "/".join(one[-length:]) for path, one in parts.items()}
        if len(set(names.values())) == len(paths) and BASE not in names.values():
            return names
    return {path: path for path in paths}


def _common_base(adapters: Sequence[str]) -> str:
    """The one base that all adapters record."""
    recorded = {
        path: read_adapter_config(resolve_adapter(path)).get("base_model_name_or_path")
        for path in adapters
    }
    first = adapters[0]
    for path, base in recorded.items():
        if not base:
            raise ConfigError(f"{path} names no base model; pass --base.")
        if base != recorded[first]:
            raise ConfigError(
                f"{first} was trained on {recorded[first]} and {path} on {base}; evaluate them "
                "apart, or pass --base."
            )
    return str(recorded[first])


def _tokenizer(base: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{base} holds a model but no tokenizer; save its tokenizer there, or change --base."
        ) from error
