"""Pictures of a training run: the loss curve and the expert load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingDependencyError
from .names import layer_label, natural_order

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_loss(log_history: Sequence[Mapping[str, Any]], out: Path, title: str) -> Path:
    """Training (and, where logged, validation) loss against the step, as PNG.

    Args:
        log_history: transformers' `trainer_state.log_history`.
        out: the PNG to write.
        title: what was trained.
    """
    figure = _figure(6.4, 3.6)
    axes = figure.subplots()
    for key, label, color, marker in (
        ("loss", "training", "#1f4e79", ""),
        ("eval_loss", "validation", "#c55a11", "o"),
    ):
        points = [(row["step"], row[key]) for row in log_history if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color=color, marker=marker)
    axes.set(xlabel="step", ylabel="loss on the answer (nats per token)", title=title)
    axes.grid(alpha=0.3)
    if axes.lines:  # a run shorter than logging_steps has logged no loss
        axes.legend(frameon=False)
    return _save(figure, out)


def plot_expert_load(routing: Mapping[str, Mapping[str, Any]], out: Path, title: str) -> Path:
    """Heat maps of layers x experts, one for each kind of module ("q_proj", ...).

    The colour is an expert's share of the selections over the fair share 1/E: white is 1.

    Args:
        routing: `RoutingStatistics.to_dict()`; modules may have different numbers of experts.
        out: the PNG to write.
        title: what was measured.
    """
    kinds: dict[str, list[tuple[str, list[float]]]] = {}
    for name in sorted(routing, key=natural_order):
        load = routing[name]["load"]
        row = (layer_label(name), [share * len(load) for share in load])
        kinds.setdefault(name.rpartition(".")[2], []).append(row)
    deepest = max(map(len, kinds.values()))
    figure = _figure(1.2 + 2.2 * len(kinds), 1.4 + 0.11 * max(deepest, 10))
    figure.suptitle(title)
    grid = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axes, (kind, rows) in zip(grid, kinds.items(), strict=True):
        labels, shares = zip(*rows, strict=True)
        width = max(map(len, shares))
        cells = [row + [float("nan")] * (width - len(row)) for row in shares]
        image = axes.imshow(cells, aspect="auto", cmap="RdBu_r", vmin=0.0, vmax=2.0)
        axes.set_title(kind, fontsize=9, parse_math=False)
        axes.set_xlabel("expert", fontsize=8)
        # A label for every row or column would overlap on deep models.
        axes.set_xticks(range(0, width, max(1, width // 5)))
        step = max(1, len(rows) // 15)
        axes.set_yticks(range(0, len(rows), step), labels[::step])
        axes.tick_params(labelsize=7)
    grid[0].set_ylabel("layer", fontsize=8)
    colorbar = figure.colorbar(image, ax=list(grid), extend="max")
    colorbar.set_label("load over fair share", fontsize=8)
    return _save(figure, out)


def _figure(width: float, height: float) -> Figure:
    try:
        # The object interface draws without pyplot's global state and without a screen.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "Drawing needs matplotlib; install it with pip install 'moelora[plot]'."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, format="png")
    return out
