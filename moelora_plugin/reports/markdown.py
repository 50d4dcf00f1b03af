"""Scores as Markdown, for a model card or a paper's repository."""

from __future__ import annotations

from collections.abc import Sequence

from moelora_eval_tasks.catalog import TASKS

from ..evaluation.report import NOISE_MARK, show_difference, show_estimate, shown_metrics
from ..evaluation.statistics import Measurement
from ..text import markdown
from .scoreboard import Scoreboard


def score_table(board: Scoreboard, models: Sequence[str] | None = None) -> str:
    """A table of scores, and under it how they were measured.

    Args:
        board: the scores.
        models: the models to show; None shows all.
    """
    names = list(models or board.models)
    compared = [name for name in names if board.reference not in (None, name)]
    head = ["task", "rows", "metric", "protocol", *map(markdown, names)]
    head += [f"{markdown(name)} - {markdown(board.reference)} [95 %]" for name in compared]
    lines = [_line(head), _line(["---", "---:", "---", "---", *["---:"] * (len(head) - 4)])]
    for task, measured in board.tasks.items():
        protocol = TASKS[task].protocol if task in TASKS else ""
        lines += _rows(markdown(task), protocol, measured, names, compared)
    for group, measured in board.groups.items():
        lines += _rows(f"**{markdown(group)}** (mean)", "", measured, names, compared)
    return "\n".join([*lines, "", how_measured(board), *_notes(board)])


def how_measured(board: Scoreboard) -> str:
    """A sentence on where the numbers come from."""
    run = next(iter(board.runs.values()))
    ours, theirs = (markdown(run.version(name)) for name in ("moelora", "lm_eval"))
    rows = f"up to {run.limit} rows of a task" if run.limit else "all rows"
    return (
        "Points (x 100) ± standard error (bootstrap over rows), measured with moelora "
        f"{ours} on lm-eval {theirs}, {rows}, zero-shot."
    )


def _notes(board: Scoreboard) -> list[str]:
    everything = [*board.tasks.values(), *board.groups.values()]
    differences = [one for measured in everything for one in measured.differences.values()]
    if not any(one.within_noise for one in differences):
        return []
    return [f"`{NOISE_MARK}` marks a difference within noise: its 95 % interval holds 0."]


def _rows(
    name: str,
    protocol: str,
    measured: Measurement,
    models: Sequence[str],
    compared: Sequence[str],
) -> list[str]:
    metrics = shown_metrics(next(iter(measured.metrics.values())))
    lines = []
    for metric in metrics:
        cells = [name, str(measured.n), markdown(metric), protocol]
        cells += [show_estimate(measured.metrics[model][metric]) for model in models]
        if metric == metrics[-1]:  # the score, which is what differences are of
            cells += [show_difference(measured.differences[model]) for model in compared]
        else:
            cells += [""] * len(compared)
        lines.append(_line(cells))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
