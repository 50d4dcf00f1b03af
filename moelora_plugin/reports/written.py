"""What this package writes, told by what it holds: `--overwrite` replaces nothing else."""

from __future__ import annotations

from pathlib import Path

from ..evaluation.report import EVALUATION_BYTES
from ..reading import Unreadable, read_json, read_text

_COMPARISONS = (
    {"models", "reference", "tasks", "groups", "left_out"},
    {"recipes", "reference", "means", "differences", "left_out"},
)
# The last is how pages before that had no name of a generator began.
_PAGES = ('<meta name="generator" content="moelora">', "<title>moelora: ")
_SCORES_HEAD = "| task | rows | metric | protocol |"
_SCORES_LINES = ("|", "Points (x 100) ± standard error", "`~` marks a difference within noise")


def holds_comparison(path: Path) -> bool:
    """Whether a file is the JSON of `moelora compare`.

    Raises:
        ConfigError: it holds no JSON.
    """
    content = read_json(path, remedy="run `moelora compare` again", most=EVALUATION_BYTES)
    return content.keys() in _COMPARISONS


def holds_page(path: Path) -> bool:
    """Whether a file is a page of `moelora report`."""
    text = _text(path)
    head = text[: text.find("<style>")].strip()
    return head.startswith("<!doctype html>") and any(mark in head for mark in _PAGES)


def holds_scores(path: Path) -> bool:
    """Whether a file is the Markdown of `moelora report`, and nothing has been added to it."""
    text = _text(path)
    lines = filter(None, text.splitlines())
    return text.startswith(_SCORES_HEAD) and all(line.startswith(_SCORES_LINES) for line in lines)


def _text(path: Path) -> str:
    try:
        return read_text(path, EVALUATION_BYTES)
    except Unreadable:
        return ""
