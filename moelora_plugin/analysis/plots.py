"""Pictures of a training run: the loss curve and the expert load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingDependencyError

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
    for key, label, style in (
        ("loss", "training", {"color": "#1f4e79"}),
        ("eval_loss", "validation", {"color": "#c55a11", "marker": "o"}),
    ):
        points = [(row["step"], row[key]) for row in log_history if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="loss on the answer (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _save(figure, out)


def plot_expert_load(routing: Mapping[str, Mapping[str, Any]], out: Path, title: str) -> Path:
    """A heat map of layers x experts: each expert's share of the selections, 1 being the fair share.

    Args:
        routing: `RoutingStatistics.to_dict()`; layers may have different numbers of experts.
        out: the PNG to write.
        title: what was measured.
    """
    rows = [[share * len(layer["load"]) for share in layer["load"]] for layer in routing.values()]
    width = max(map(len, rows))
    grid = [row + [float("nan")] * (width - len(row)) for row in rows]
    labels = [_short(name) for name in routing]
    figure = _figure(7.2, max(3.0, 0.11 * len(labels) + 1.2))
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", cmap="RdBu_r", vmin=0.0, vmax=2.0)
    axes.set(xlabel="expert", title=title)
    axes.set_xticks(range(width))
    # A label for every row would overlap on deep models.
    stride = max(1, len(labels) // 30)
    axes.set_yticks(range(0, len(labels), stride), labels[::stride])
    axes.tick_params(labelsize=6)
    colorbar = figure.colorbar(image, ax=axes, extend="max")
    colorbar.set_label("load over fair share", fontsize=8)
    return _save(figure, out)


def _short(name: str) -> str:
    """Layer index and module of a dotted name: "12 q_proj"."""
    parts = name.split(".")
    index = next((part for part in parts if part.isdigit()), "")
    return f"{index} {parts[-1]}".strip()


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
    figure.savefig(out, dpi=150)
    return out
