"""The plot of scores: a dot with its 95 % interval for each task and model; positions in an SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moelora_eval_tasks.scoring import SCORE

from ...evaluation.report import show_difference, show_estimate
from ...evaluation.statistics import Measurement
from ..scoreboard import Scoreboard

WIDTH = 1000
_LABELS, _SPLIT, _GAP, _RIGHT = 190, 620, 40, 980
_TOP, _LINE, _PAD = 44, 17, 13
_Z = 1.96  # standard errors to either side of a 95 % interval


@dataclass(frozen=True)
class Axis:
    """A horizontal scale: points `low` to `high` on pixels `left` to `right`."""

    low: float
    high: float
    left: float
    right: float

    def at(self, value: float) -> float:
        """The position of a value, inside of the axis."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.left + share * (self.right - self.left), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """(position, label) of four to eight round values."""
        rough = (self.high - self.low) / 6
        power = 10 ** math.floor(math.log10(rough))
        step = next(step for m in (1, 2, 5, 10) if (step := m * power) >= rough)
        first = math.ceil(self.low / step)
        last = math.floor(self.high / step)
        return [(self.at(k * step), f"{k * step:g}") for k in range(first, last + 1)]


def forest_plot(board: Scoreboard) -> dict[str, Any]:
    """Rows of marks, for the template: scores on the left, differences on the right."""
    measured = {
        **{name: (one, False) for name, one in board.tasks.items()},
        **{name: (one, True) for name, one in board.groups.items()},
    }
    everything = [one for one, _ in measured.values()]
    differences = [d for one in everything for d in one.differences.values()]
    scores = [metrics[SCORE] for one in everything for metrics in one.metrics.values()]
    lowest = min((100 * (one.value - _Z * one.stderr) for one in scores), default=0.0)
    axis = Axis(min(0.0, lowest), 100.0, _LABELS, _SPLIT if differences else _RIGHT)
    reach = max((100 * abs(end) for one in differences for end in one.interval), default=0.0)
    beside = Axis(-(reach * 1.05 or 1.0), reach * 1.05 or 1.0, _SPLIT + _GAP, _RIGHT)
    rows, y = [], float(_TOP)
    for name, (one, is_mean) in measured.items():
        height = _LINE * len(one.metrics) + _PAD
        rows.append(
            {
                "name": name,
                "n": one.n,
                "is_mean": is_mean,
                "top": y,
                "height": height,
                "scores": _scores(one, axis, y + _PAD / 2),
                "differences": _differences(one, list(board.models), beside, y + _PAD / 2),
            }
        )
        y += height
    return {
        "width": WIDTH,
        "height": y + 8,
        "bottom": y,
        "top": _TOP,
        "axis": axis,
        "beside": beside if differences else None,
        "rows": rows,
    }


def _scores(one: Measurement, axis: Axis, top: float) -> list[dict[str, Any]]:
    marks = []
    for i, (model, metrics) in enumerate(one.metrics.items()):
        score = metrics[SCORE]
        ends = [axis.at(100 * (score.value + z * score.stderr)) for z in (-_Z, _Z)]
        said = f"{model}: {show_estimate(score)}"
        marks.append(_mark(i, axis.at(100 * score.value), ends, top, said))
    return marks


def _differences(
    one: Measurement, models: Sequence[str], axis: Axis, top: float
) -> list[dict[str, Any]]:
    marks = []
    for model, difference in one.differences.items():
        ends = [axis.at(100 * end) for end in difference.interval]
        said = f"{model}: {show_difference(difference)}"
        marks.append(
            _mark(models.index(model), axis.at(100 * difference.value), ends, top, said)
            | {"is_noise": difference.within_noise}
        )
    return marks


def _mark(model: int, x: float, ends: Sequence[float], top: float, title: str) -> dict[str, Any]:
    y = round(top + _LINE * (model + 0.5), 1)
    return {"model": model, "x": x, "ends": ends, "y": y, "title": title, "is_noise": False}
