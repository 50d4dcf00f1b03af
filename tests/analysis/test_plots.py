"""The pictures are PNGs that show something."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moelora_plugin.analysis.plots import plot_expert_load, plot_loss
from moelora_plugin.errors import MissingDependencyError

HISTORY: list[dict[str, Any]] = [
    *({"step": step, "loss": 3.0 / step, "lr": 1e-4} for step in range(1, 20)),
    {"step": 10, "eval_loss": 0.4},
    {"step": 19, "train_loss": 0.7},
]


def layer(load: list[float]) -> dict[str, Any]:
    return {"tokens": 9, "load": load, "weight": load, "entropy": 1.0, "not_finite": 0}


def colours(path: Path) -> Counter[tuple[int, int, int]]:
    """How many pixels have each colour."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
        found = image.convert("RGB").getcolors(maxcolors=1 << 24)
    assert found is not None
    return Counter({colour: count for count, colour in found})  # type: ignore[misc]


def test_the_loss_curve(tmp_path: Path) -> None:
    path = plot_loss(HISTORY, tmp_path / "new" / "loss.png", "a title")
    assert path == tmp_path / "new" / "loss.png"
    drawn = colours(path)
    assert drawn[0x1F, 0x4E, 0x79] > 100  # training
    assert drawn[0xC5, 0x5A, 0x11] > 10  # validation


def test_a_run_without_a_logged_loss_is_drawn_empty(tmp_path: Path) -> None:
    drawn = colours(plot_loss([{"step": 1, "train_loss": 1.0}], tmp_path / "loss.png", "a title"))
    assert (0x1F, 0x4E, 0x79) not in drawn


def test_the_expert_load(tmp_path: Path) -> None:
    def draw(*load: float) -> Counter[tuple[int, int, int]]:
        routing = {"model.layers.0.q_proj": layer(list(load))}
        return colours(plot_expert_load(routing, tmp_path / "load.png", "a title"))

    even, skewed = draw(0.25, 0.25, 0.25, 0.25), draw(0.5, 0.5, 0.0, 0.0)
    # The ends of the scale RdBu_r, twice the fair share and none of it, are in the colour bar too.
    for end in ((0x67, 0x00, 0x1F), (0x05, 0x30, 0x61)):
        assert skewed[end] > even[end] + 1000


def test_modules_with_other_numbers_of_experts(tmp_path: Path) -> None:
    routing = {
        "vision.layers.0.q_proj": layer([0.5, 0.5]),
        "text.layers.0.q_proj": layer([0.2] * 5),
        "text.layers.10.q_proj": layer([1.0]),
        "text.layers.2.up_proj": layer([0.125] * 8),
        "head": layer([0.3, 0.7]),
    }
    assert len(colours(plot_expert_load(routing, tmp_path / "load.png", "a title"))) > 3


def test_drawing_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'moelora\[plot\]'"):
        plot_loss(HISTORY, tmp_path / "loss.png", "a title")
    assert list(tmp_path.iterdir()) == []
