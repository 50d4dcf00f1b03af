"""Runs read back from their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moelora_eval_tasks.metrics import Array

from ..errors import ConfigError
from ..evaluation.report import FORMAT_VERSION
from ..evaluation.request import DEFAULT_OUTPUT
from ..evaluation.statistics import Measurement

_KEYS = ("models", "reference", "tasks", "groups", "predictions")


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
        details: all other keys of the file, as they stand there.
    """

    path: Path
    models: dict[str, dict[str, Any]]
    reference: str | None
    tasks: dict[str, Measurement]
    groups: dict[str, Measurement]
    predictions: dict[str, Rows] = field(repr=False)
    details: dict[str, Any] = field(repr=False)


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
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; name a file that `moelora eval` has written.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content["format_version"]
    except (ValueError, TypeError, KeyError):
        raise ConfigError(f"{file} is not a file that `moelora eval` has written.") from None
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{file} has format version {version}, this moelora reads {FORMAT_VERSION}; "
            "run `moelora eval` again."
        )
    try:
        return _run(file, content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{file} is incomplete or was changed ({type(error).__name__} {error}); "
            "run `moelora eval` again."
        ) from None


def _run(file: Path, content: Mapping[str, Any]) -> Run:
    return Run(
        file,
        content["models"],
        content["reference"],
        {name: Measurement.from_dict(one) for name, one in content["tasks"].items()},
        {name: Measurement.from_dict(one) for name, one in content["groups"].items()},
        {name: _rows(one) for name, one in content["predictions"].items()},
        {key: value for key, value in content.items() if key not in _KEYS},
    )


def _rows(content: Mapping[str, Any]) -> Rows:
    label = np.asarray(content["label"], dtype=np.float64)
    preds = {model: np.asarray(p, dtype=np.float64) for model, p in content["models"].items()}
    if any(pred.shape != label.shape for pred in preds.values()):
        raise ValueError("predictions and labels differ in number")
    return Rows(content["prompts_sha256"], label, preds)
