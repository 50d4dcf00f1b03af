"""The models of one evaluation, one after the other on a single load of the base."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelora_eval_tasks.catalog import Task

from ..base_model import load_base_model, load_config
from ..checkpoint import check_adapter, load_adapter, read_adapter_config, resolve_adapter
from ..errors import ConfigError
from ..fingerprints import UnreadableError, weights_digest
from ..processors import load_processor
from . import provenance
from .cache import model_identity
from .images import refuse_images
from .lm.quiet import no_bars
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
        identity: what tells it from all other models, for the cache; None where that cannot be
            told.
        task_ids: ids by task, where its adapter routes by them.
    """

    name: str
    model: Any
    processor: Any
    record: Mapping[str, Any]
    identity: Mapping[str, Any] | None
    task_ids: Mapping[str, int] = field(default_factory=dict)


def subjects(
    request: EvaluationRequest, tasks: Sequence[Task], device: str | None = None
) -> Iterator[Subject]:
    """The base, if it is asked for, and then each adapter on it.

    After each adapter the base must be bitwise what it was; one that keeps trained biases or other
    weights of the adapter, or gives no digest, is loaded anew.

    Args:
        request: which models.
        tasks: what they are to be scored on.
        device: where they are put.

    Raises:
        ConfigError: adapters for different bases, a base without a tokenizer, or one that cannot
            be shown the images of a task.
        AdapterError: an adapter that cannot be loaded.
        MissingDependencyError: a model is not here and the hub cannot be reached.
    """
    for path in request.adapters:  # before the time that loading a base takes
        check_adapter(path, request.base, allow_base_mismatch=request.allow_base_mismatch)
    base_name, revision = _common_base(request)
    refuse_images(load_config(base_name, revision), tasks)

    def load() -> Any:
        with no_bars():
            base = load_base_model(base_name, revision=revision, dtype=request.dtype, device=device)
        return base.eval()

    base = load()
    digest = _digest(base)
    if request.compare_base or not request.adapters:
        processor = load_processor(base_name, base.config, revision=revision)
        identity = None if digest is None else model_identity(base, digest, processor, None)
        yield Subject(BASE, base, processor, provenance.model_of(base), identity)
    for path, name in adapter_names(request.adapters).items():
        if base is None:
            base = load()
        model, processor = load_adapter(
            path, base=base, allow_base_mismatch=request.allow_base_mismatch
        )
        of_adapter = provenance.adapter_of(path)
        record = {**provenance.model_of(model), **of_adapter}
        identity = (
            None
            if digest is None
            else model_identity(base, digest, processor, of_adapter["sha256"])
        )
        task_ids = trained_task_ids(model, path, tasks)
        yield Subject(name, model, processor, record, identity, task_ids)
        base = _without_adapter(model, digest)
        del model


def adapter_names(paths: Sequence[str]) -> dict[str, str]:
    """For each path the shortest end of it that tells it from the others ("a/adapter")."""
    parts = {path: Path(path).parts for path in paths}
    for length in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {path: "/".join(one[-length:]) for path, one in parts.items()}
        if len(set(names.values())) == len(paths) and BASE not in names.values():
            return names
    return {path: path for path in paths}


def _digest(base: Any) -> str | None:
    """The digest of the base's weights; None, with a warning, where they give none."""
    try:
        return weights_digest(base)
    except UnreadableError as error:
        warnings.warn(
            f"The base's weights cannot be told from others ({error}), so its answers are not kept "
            "and it is loaded anew for each adapter.",
            stacklevel=2,
        )
        return None


def _without_adapter(model: Any, digest: str | None) -> Any:
    """The base of an adapted model as it was, or None where it cannot be had back."""
    if digest is None:
        return None
    try:
        base = model.unload()
        return base if weights_digest(base) == digest else None
    except Exception:  # what an adapter's type cannot undo; the scores so far are worth more
        return None


def _common_base(request: EvaluationRequest) -> tuple[str, str | None]:
    """The base that is asked for, or the one that all adapters record, and its revision."""
    recorded: dict[str, tuple[Any, Any]] = {}
    for path in request.adapters:
        config = read_adapter_config(resolve_adapter(path))
        recorded[path] = config.get("base_model_name_or_path"), config.get("revision")
    if request.base is not None:
        of_base = {revision for name, revision in recorded.values() if name == request.base}
        return request.base, of_base.pop() if len(of_base) == 1 else None
    first = request.adapters[0]
    for path, base in recorded.items():
        if not base[0]:
            raise ConfigError(f"{path} names no base model; pass --base.")
        if base != recorded[first]:
            known, other = (" at ".join(filter(None, one)) for one in (recorded[first], base))
            raise ConfigError(
                f"{first} was trained on {known} and {path} on {other}; evaluate them apart, or "
                "pass --base."
            )
    return recorded[first]
