"""Runs read back from their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moelora_eval_tasks.metrics import Array
from moelora_eval_tasks.scoring import SCORE

from ..errors import ConfigError
from ..evaluation.report import EVALUATION_BYTES, FORMAT_VERSION
from ..evaluation.request import DEFAULT_OUTPUT
from ..evaluation.statistics import Measurement
from ..reading import Unreadable, parse_json, read_bytes
from ..schema import from_mapping, require, written_by

_KEYS = ("models", "reference", "tasks", "groups", "predictions")
_SOURCE = written_by("moelora eval")


@dataclass(frozen=True)
class Rows:
    """What was predicted on the rows of one task.

    Attributes:
        prompts_sha256: digest of every context and choice that was scored.
        label: labels (n,).
        preds: predictions (n,) by model.
    """

    prompts_sha256: str
    label: Array
    preds: dict[str, Array]


@dataclass(frozen=True)
class Run:
    """One `moelora_eval.json`.

    Attributes:
        path: the file.
        models: by model what is known of it.
        reference: the model that the others were compared with.
        tasks: what the models came out at on each task.
        groups: likewise on each group.
        predictions: by task what was predicted on each row.
        details: all other keys of the file, as they stand there; those of `_Details` are there and
            have its types.
    """

    path: Path
    models: dict[str, dict[str, Any]]
    reference: str | None
    tasks: dict[str, Measurement]
    groups: dict[str, Measurement]
    predictions: dict[str, Rows] = field(repr=False)
    details: dict[str, Any] = field(repr=False)

    @property
    def limit(self) -> int | None:
        """Rows drawn of each task; None where all were scored."""
        limit: int | None = self.details["request"]["limit"]
        return limit

    def version(self, package: str) -> str:
        """The version of a package that the run was made with."""
        return self.details["versions"].get(package) or "of an unknown version"


# What the readers of a run rely on; a file of ours has more.


@dataclass(frozen=True)
class _Model:
    base: str | None = None
    path: str | None = None
    device_name: str | None = None
    dtype: str | None = None
    sha256: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Predictions:
    prompts_sha256: str
    label: list[float]
    models: dict[str, list[float]]


@dataclass(frozen=True)
class _Layer:
    load: list[float]
    entropy: float


@dataclass(frozen=True)
class _Documents:
    file: str
    sha256: str


@dataclass(frozen=True)
class _Request:
    limit: int | None = None


@dataclass(frozen=True)
class _Details:
    request: _Request = field(default_factory=_Request)
    versions: dict[str, str | None] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    began: str | None = None
    seconds: float | None = None
    overlap: dict[str, dict[str, int | None]] = field(default_factory=dict)
    expert_use: dict[str, dict[str, dict[str, _Layer]]] = field(default_factory=dict)
    documents: _Documents | None = None


@dataclass(frozen=True)
class _Content:
    models: dict[str, _Model]
    reference: str | None
    tasks: dict[str, Measurement]
    groups: dict[str, Measurement]
    predictions: dict[str, _Predictions]


def read_run(path: str | Path) -> Run:
    """Read what `moelora eval` has written.

    Args:
        path: the file, or the folder that holds it as `moelora_eval.json`.

    Raises:
        ConfigError: it is not there, is no such file, or another version of moelora wrote it.
    """
    file = Path(path)
    if file.is_dir():
        file = file / DEFAULT_OUTPUT
    if not file.exists():
        raise ConfigError(f"{file} does not exist; name a file that `moelora eval` has written.")
    try:
        content = parse_json(read_bytes(file, EVALUATION_BYTES))
    except Unreadable as reason:
        raise ConfigError(
            f"{file} is not a file that `moelora eval` has written (it {reason}); name one that is."
        ) from None
    if not isinstance(content, dict) or "format_version" not in content:
        raise ConfigError(
            f"{file} is not a file that `moelora eval` has written; name one that is."
        )
    version = content["format_version"]
    if type(version) is not int or version != FORMAT_VERSION:
        raise ConfigError(
            f"{file} has format version {str(version)[:20]}, this moelora reads {FORMAT_VERSION}; "
            "run `moelora eval` again."
        )
    try:
        return _run(file, content)
    except ConfigError as error:
        raise ConfigError(f"{file} is incomplete or was changed: {error}") from None


def _run(file: Path, content: Mapping[str, Any]) -> Run:
    found = from_mapping(_Content, content, source=_SOURCE)
    details = asdict(from_mapping(_Details, content, source=_SOURCE))
    _check(found, details)
    rest = {key: value for key, value in content.items() if key not in _KEYS}
    request = {**content.get("request", {}), **details["request"]}
    return Run(
        file,
        {name: content["models"][name] for name in found.models},
        found.reference,
        found.tasks,
        found.groups,
        {
            name: Rows(
                one.prompts_sha256,
                np.asarray(one.label, dtype=np.float64),
                {model: np.asarray(pred, dtype=np.float64) for model, pred in one.models.items()},
            )
            for name, one in found.predictions.items()
        },
        {**rest, **details, "request": request},
    )


def _check(found: _Content, details: Mapping[str, Any]) -> None:
    """What the types do not say: the parts of a file are about the same models and rows."""
    expected = "the results of at least one task"
    require(bool(found.predictions), "predictions", found.predictions, expected, _SOURCE)
    same_tasks = found.tasks.keys() == found.predictions.keys()
    require(same_tasks, "tasks", list(found.tasks), "what predictions has", _SOURCE)
    models = list(next(iter(found.predictions.values())).models)
    for task, rows in found.predictions.items():
        key = f"predictions.{task}"
        require(bool(rows.label), f"{key}.label", rows.label, "a row or more", _SOURCE)
        for model, pred in rows.models.items():
            expected = f"a prediction for each of {len(rows.label)} rows"
            require(len(pred) == len(rows.label), f"{key}.models.{model}", pred, expected, _SOURCE)
        _check_models(f"{key}.models", rows.models, models)
    # Of the base of a model that was in memory nothing more is known.
    known = set(found.models) <= set(models)
    require(known, "models", list(found.models), f"no others than {models}", _SOURCE)
    known = found.reference is None or found.reference in models
    require(known, "reference", found.reference, f"one of {models}", _SOURCE)
    for section in ("tasks", "groups"):
        for name, one in getattr(found, section).items():
            _check_measurement(f"{section}.{name}", one, models, found.reference)
    for model, by_task in details["expert_use"].items():
        for task, used in by_task.items():
            key = f"expert_use.{model}.{task}"
            require(bool(used), key, used, "a layer or more", _SOURCE)
            for name, layer in used.items():
                load = layer["load"]
                require(bool(load), f"{key}.{name}.load", load, "an expert or more", _SOURCE)
    if details["documents"]:
        file = details["documents"]["file"]
        is_name = Path(file).name == file not in ("", "..")
        require(is_name, "documents.file", file, "the name of a file beside this one", _SOURCE)


def _check_measurement(
    key: str, one: Measurement, models: list[str], reference: str | None
) -> None:
    require(one.n > 0, f"{key}.n", one.n, "a row or more", _SOURCE)
    _check_models(f"{key}.metrics", one.metrics, models)
    first = one.metrics[models[0]]
    require(SCORE in first, f"{key}.metrics.{models[0]}", list(first), f"a {SCORE}", _SOURCE)
    for model, metrics in one.metrics.items():
        expected = f"the metrics {list(first)}"
        same = metrics.keys() == first.keys()
        require(same, f"{key}.metrics.{model}", list(metrics), expected, _SOURCE)
    others = [model for model in models if reference not in (None, model)]
    _check_models(f"{key}.differences", one.differences, others)
    for name, part in one.categories.items():
        _check_measurement(f"{key}.categories.{name}", part, models, reference)


def _check_models(key: str, found: Mapping[str, Any], expected: list[str]) -> None:
    # Which order they have is no matter: all is looked up by name.
    require(set(found) == set(expected), key, list(found), f"the models {expected}", _SOURCE)
