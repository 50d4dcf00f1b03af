"""Reports of runs without a model: invented rows, labels and answers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moelora_eval_tasks.catalog import GROUPS, TASKS
from moelora_plugin.evaluation import provenance
from moelora_plugin.evaluation.harness import Predictions
from moelora_plugin.evaluation.report import EvaluationReport
from moelora_plugin.evaluation.statistics import combine, measure

LAYERS = [f"model.layers.{i}.self_attn.{kind}" for i in range(3) for kind in ("q_proj", "v_proj")]


def picture() -> dict[str, Any]:
    """An image as rows hold it."""
    out = io.BytesIO()
    Image.new("RGBA", (640, 320), "teal").save(out, "PNG")
    return {"bytes": out.getvalue(), "path": "teal.png"}


def row(i: int, label: float, task: str = "sst2", **changes: Any) -> dict[str, Any]:
    """A rendered row, as `load_for_lm_eval` makes it, of a question about the number `i`."""
    choices = [f" {answer}" for answer in TASKS[task].answers] or [" A", " B"]
    return {
        "context": f"### Input:\nComment number {i} <script>window.hacked = 1</script> & more\n",
        "choices": choices,
        "gold": int(label),
        "options": [],
        "category": None,
        "image": None,
        "label": label,
        **changes,
    }


def used(seed: int = 0) -> dict[str, Any]:
    """The use of four experts in six layers, of which one expert is never selected."""
    rng = np.random.default_rng(seed)
    found = {}
    for name in LAYERS:
        load = [*rng.dirichlet([2.0, 2.0, 2.0]).round(6).tolist(), 0.0]
        found[name] = {"tokens": 90, "load": load, "weight": load, "entropy": 0.9, "not_finite": 0}
    return found


def scored(
    right: Mapping[str, Mapping[str, Sequence[bool]]],
    *,
    reference: str | None = "base",
    groups: Sequence[str] = (),
    experts: Sequence[str] = ("adapter",),
    request: Mapping[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> EvaluationReport:
    """A report.

    Args:
        right: by task and model whether it was right on each row; all labels are 1.
        reference: the model that the others are compared with.
        groups: groups of tasks that were asked for.
        experts: the models that are MoE-LoRA adapters.
        request: keys of the request.
        changes: of every row.
    """
    found: dict[str, dict[str, Predictions]] = {}
    rows = {}
    for task, by_model in right.items():
        n = len(next(iter(by_model.values())))
        label = np.ones(n)
        rows[task] = [row(i, label[i], task, **(changes or {})) for i in range(n)]
        for model, hits in by_model.items():
            pred = np.asarray(hits, dtype=np.float64)
            answers = tuple(rows[task][i]["choices"][int(pred[i])].strip() for i in range(n))
            experts_used = used(n) if model in experts else {}
            found.setdefault(model, {})[task] = Predictions(
                label, pred, answers, f"digest of {n}", experts_used
            )
    measured = {
        task: measure(
            TASKS[task],
            np.ones(len(rows[task])),
            {model: one[task].pred for model, one in found.items()},
            reference,
            categories=[one["category"] for one in rows[task]] if changes else None,
        )
        for task in right
    }
    record = {"base": "org/base", "dtype": "torch.float32", "device_name": "x86_64"}
    return EvaluationReport(
        tasks=measured,
        groups={name: combine([measured[task] for task in GROUPS[name]]) for name in groups},
        predictions=found,
        reference=reference,
        models=dict.fromkeys(found, record),
        details={
            **provenance.environment(),
            "began": "2026-01-02T03:04:05+00:00",
            "seconds": 1.5,
            "request": {"limit": None, "seed": 0, **(request or {})},
        },
        documents=rows.__getitem__,
    )


def hits(n: int, share: float, seed: int) -> list[bool]:
    """Right on a share of the rows."""
    return (np.random.default_rng(seed).random(n) < share).tolist()


def write_run(path: Path, **options: Any) -> Path:
    """Write a run of a base and an adapter on two tasks."""
    right = {
        "sst2": {"base": hits(60, 0.6, 0), "adapter": hits(60, 0.9, 1)},
        "rte": {"base": hits(40, 0.55, 2), "adapter": hits(40, 0.55, 3)},
    }
    scored(options.pop("right", right), **options).write(path)
    return path
