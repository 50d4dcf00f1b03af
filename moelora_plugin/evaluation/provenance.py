"""What a run depended on, for the JSON file: enough to repeat it and to notice what has changed."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterable
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moelora_eval_tasks.catalog import PREFIX, TASKS, Task
from moelora_eval_tasks.loading import local_file

from ..checkpoint import CONFIG_FILE, WEIGHTS_FILE, resolve_adapter
from ..files import sha256_of
from ..fingerprints import brief_digest

if TYPE_CHECKING:
    from .harness import LoadedTasks

PACKAGES = (
    *("moelora", "torch", "transformers", "peft", "accelerate", "tokenizers", "bitsandbytes"),
    *("lm_eval", "datasets", "numpy", "scipy"),
)


def environment() -> dict[str, Any]:
    """The command line, the versions, and the digests of the code that makes prompts and scores."""
    return {
        "command": sys.argv,
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        "eval_tasks_sha256": _package_digests(),
    }


def datasets_of(tasks: Iterable[Task], data_dir: str | None) -> dict[str, dict[str, Any]]:
    """Where each task's rows came from.

    A hub id, its revision and the `datasets` fingerprint of the split, or a local file and its
    digest.
    """
    records: dict[str, dict[str, Any]] = {}
    for task in tasks:
        record: dict[str, Any] = {"split": task.eval_split, "rows": task.eval_slice}
        if task.parts:
            record["parts"] = datasets_of([TASKS[name] for name in task.parts], data_dir)
        elif data_dir is None:
            record |= {
                "hub_id": task.hub_id,
                "config": task.config,
                "revision": task.revision,
                "fingerprint": _hub_fingerprint(task),
            }
        else:
            path = local_file(task, task.eval_split, data_dir)
            record |= {"file": str(path), "sha256": sha256_of(path)}
        records[task.name] = record
    return records


def settings_of(loaded: LoadedTasks) -> dict[str, dict[str, Any]]:
    """How each task was scored: protocol, version, and what lm-eval was told."""
    records = {}
    for task in loaded.tasks:
        config = loaded.lm_eval["tasks"][PREFIX + task.name].config
        records[task.name] = {
            "protocol": task.protocol,
            "version": (config.metadata or {}).get("version"),
            "num_fewshot": config.num_fewshot,
            "generation": config.generation_kwargs if task.generates else None,
        }
    return records


def model_of(model: Any) -> dict[str, Any]:
    """What a model is: its base, how that is held, and the active adapters' configs."""
    config = model.config
    parameter = next(model.parameters())
    peft_config = getattr(model, "peft_config", {})
    active = getattr(model, "active_adapters", []) if peft_config else []
    quantization = getattr(config, "quantization_config", None)
    return {
        "base": config.name_or_path,
        "revision": getattr(config, "_commit_hash", None),
        "base_fingerprint": brief_digest(model, _prefix(model)),
        "dtype": str(parameter.dtype),
        "quantization": None if quantization is None else _plain(_as_dict(quantization)),
        "attention": getattr(config, "_attn_implementation", None),
        "device": str(parameter.device),
        "device_name": _device_name(parameter.device),
        "adapters": {name: _plain(peft_config[name].to_dict()) for name in active},
    }


def adapter_of(path: str) -> dict[str, Any]:
    """An adapter's path or hub id, and the digests of its weights and of its config."""
    folder = resolve_adapter(path)
    digests = {name: sha256_of(folder / name) for name in (WEIGHTS_FILE, CONFIG_FILE)}
    return {"path": path, "sha256": digests}


def _prefix(model: Any) -> str | None:
    """What marks the parameters of a model's adapter."""
    prefix: str | None = getattr(getattr(model, "base_model", None), "prefix", None)
    return prefix


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _hub_fingerprint(task: Task) -> str | None:
    """What `datasets` knows the split by; it is in its cache by now.

    None where it cannot be had any more: no reason to lose the scores.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(task.hub_id, task.config, split=task.eval_split, revision=task.revision)
    except (OSError, ValueError):
        return None
    return str(rows._fingerprint)


def _as_dict(config: Any) -> dict[str, Any]:
    content: dict[str, Any] = config if isinstance(config, dict) else config.to_dict()
    return content


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _package_digests() -> dict[str, str]:
    root = Path(str(files("moelora_eval_tasks")))
    found = [*root.rglob("*.py"), *root.rglob("*.yaml")]
    return {str(path.relative_to(root)): sha256_of(path) for path in sorted(found)}


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """JSON's own types: PEFT's configs hold sets and enums."""
    plain: dict[str, Any] = json.loads(json.dumps(config, default=_plain_value))
    return plain


def _plain_value(value: Any) -> Any:
    if isinstance(value, set):
        return sorted(value)
    return value.value if isinstance(value, Enum) else str(value)
