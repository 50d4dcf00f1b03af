"""Answers that are kept, so that an interrupted run goes on where it was.

An entry is one model's answers to one task. Its name is a digest of all that they follow from: the
rows as they are shown and parsed, the settings, every weight of the base, the adapter's files, the
tokenizer, the versions of the packages that compute, and our own sources. What changes them by no
more than rounding is left out: batch size, number of processes and of threads.

lm-eval's own cache is not used: its key holds no model, so that an adapter gets its base's answers.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..files import cache_folder, sha256_of, write_text
from ..reading import read_json
from ..schema import from_mapping
from .harness import Predictions
from .report import EVALUATION_BYTES

_PACKAGES = ("torch", "transformers", "peft", "lm_eval", "tokenizers", "accelerate")
_SOURCES = ("moelora_plugin", "moelora_eval_tasks")


@dataclass(frozen=True)
class _Kept:
    """A file's content: what `Predictions` has."""

    label: list[float]
    pred: list[float]
    answers: list[str]
    prompts_sha256: str
    expert_use: dict[str, dict[str, Any]]


class PredictionCache:
    """The answers of one model."""

    def __init__(self, identity: Mapping[str, Any]) -> None:
        """Keep the answers of the model that `identity` tells from all others (JSON values)."""
        self._folder = cache_folder() / "evaluation"
        self._identity = identity

    def read(self, task: Mapping[str, Any]) -> Predictions | None:
        """The answers to a task, or None where there are none or they cannot be read."""
        try:
            content = read_json(self._file(task), remedy="", most=EVALUATION_BYTES)
            kept = from_mapping(_Kept, content)
        except ConfigError:
            return None
        if not len(kept.label) == len(kept.pred) == len(kept.answers):
            return None
        label, pred = (np.asarray(values, np.float64) for values in (kept.label, kept.pred))
        return Predictions(label, pred, tuple(kept.answers), kept.prompts_sha256, kept.expert_use)

    def write(self, task: Mapping[str, Any], predictions: Predictions) -> bool:
        """Keep the answers to a task; False where the folder cannot be written to."""
        arrays = {"label": predictions.label.tolist(), "pred": predictions.pred.tolist()}
        try:
            write_text(self._file(task), json.dumps(asdict(predictions) | arrays))
        except OSError:
            return False
        return True

    def _file(self, task: Mapping[str, Any]) -> Path:
        key = json.dumps([self._identity, task, environment()], sort_keys=True)
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


@cache
def environment() -> dict[str, str]:
    """The packages that compute, and a digest of our own sources."""
    digest = hashlib.sha256()
    for package in _SOURCES:
        root = Path(str(files(package)))
        for path in sorted((*root.rglob("*.py"), *root.rglob("*.yaml"))):
            digest.update(f"{path.relative_to(root)} {sha256_of(path)}\n".encode())
    return {name: version(name) for name in _PACKAGES} | {"moelora": digest.hexdigest()}


def model_identity(
    base: Any, base_digest: str, processor: Any, adapter: Mapping[str, str] | None
) -> dict[str, Any]:
    """What tells a model from all others.

    Args:
        base: the base model.
        base_digest: its `fingerprints.weights_digest`.
        processor: its tokenizer or processor.
        adapter: digests of the adapter's files; None is the base alone.
    """
    config = {key: value for key, value in base.config.to_dict().items() if key[0] != "_"}
    return {
        "weights": base_digest,
        "config": json.loads(json.dumps(config, default=str)),
        "attention": getattr(base.config, "_attn_implementation", None),
        "device": base.device.type,
        "processor": _files_digest(processor),
        "adapter": adapter,
    }


def _files_digest(processor: Any) -> str:
    """Digest of what a tokenizer or processor is saved as."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(f"{path.relative_to(folder)} {sha256_of(path)}\n".encode())
    return digest.hexdigest()
