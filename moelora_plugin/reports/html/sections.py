"""What the page's script shows: documents and the use of experts."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

from ...analysis.names import layer_label, natural_order
from ...evaluation.documents import Document, read_documents
from ...evaluation.expert_use import ExpertUse
from ..scoreboard import Scoreboard


def documents_of(board: Scoreboard, most: int) -> list[dict[str, Any]]:
    """By task its number of documents, and `most` of them with every model's answers.

    Empty where no run's documents are there.
    """
    tables: dict[str, dict[str, list[Document]]] = {}
    for run in board.runs.values():
        record = run.details.get("documents")
        if record and (path := run.path.with_name(record["file"])).exists():
            numbers = {task: len(one.label) for task, one in run.predictions.items()}
            models = list(next(iter(run.predictions.values())).preds)
            tables[str(run.path)] = read_documents(path, record["sha256"], numbers, models)
    shown = []
    for task in board.tasks:
        by_model = {
            name: (tables[str(run.path)][task], model)
            for name, (run, model) in board.models.items()
            if str(run.path) in tables
        }
        if by_model:
            rows = _joined(by_model)
            chosen = sorted(sorted(rows, key=_priority)[:most], key=lambda row: int(row["doc"]))
            shown.append(
                {
                    "name": task,
                    "total": len(rows),
                    "documents": [{**row, "image": _data_url(row["image"])} for row in chosen],
                }
            )
    return shown


def expert_use_of(board: Scoreboard) -> list[dict[str, Any]]:
    """By model and task the heat maps: for each kind of module, layers x experts.

    A cell is an expert's share of the selections over the fair share 1/E.
    """
    found = []
    for (model, task), used in _recorded(board).items():
        kinds: dict[str, list[dict[str, Any]]] = {}
        for name in sorted(used, key=natural_order):
            load = used[name]["load"]
            cells = [round(share * len(load), 3) for share in load]
            row = {"layer": layer_label(name), "cells": cells}
            kinds.setdefault(name.rpartition(".")[2], []).append(row)
        found.append({"model": model, "task": task, "kinds": kinds})
    return found


def expert_use_summary(board: Scoreboard) -> list[dict[str, Any]]:
    """By model and task three numbers over its layers.

    evenness: mean entropy of the router's probabilities over log E; 1 is uniform. busiest: the
    largest share of the selections over the fair share. unused: experts that were never selected,
    of `experts`.
    """
    return [
        {
            "model": model,
            "task": task,
            "evenness": sum(map(_evenness, used.values())) / len(used),
            "busiest": max(max(one["load"]) * len(one["load"]) for one in used.values()),
            "unused": sum(one["load"].count(0) for one in used.values()),
            "experts": sum(len(one["load"]) for one in used.values()),
        }
        for (model, task), used in _recorded(board).items()
    ]


def _recorded(board: Scoreboard) -> dict[tuple[str, str], ExpertUse]:
    return {
        (name, task): run.details["expert_use"][model][task]
        for name, (run, model) in board.models.items()
        for task in board.tasks
        if task in run.details["expert_use"].get(model, {})
    }


def _evenness(layer: Mapping[str, Any]) -> float:
    experts = len(layer["load"])
    return layer["entropy"] / math.log(experts) if experts > 1 else 1.0


def _joined(by_model: Mapping[str, tuple[list[Document], str]]) -> list[Document]:
    """The documents of one task with the answers of models from several files."""
    (first, _), *_ = by_model.values()
    return [
        {
            **document,
            **{
                key: {name: table[i][key][model] for name, (table, model) in by_model.items()}
                for key in ("answers", "right")
            },
        }
        for i, document in enumerate(first)
    ]


def _priority(row: Document) -> int:
    """Disagreement first, then errors."""
    right = set(row["right"].values())
    return 0 if len(right) > 1 else 1 if False in right else 2


def _data_url(image: bytes | None) -> str | None:
    return None if image is None else f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
