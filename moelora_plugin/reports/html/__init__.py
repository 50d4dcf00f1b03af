"""A page of scores that opens without a network: one file with its styles, scripts and pictures.

`page.html` is the template; `page.css` and `page.js` go into it as they are. Whatever comes from
data is made harmless and escaped: by the template, which does so by default, or by `_for_script`,
and the script makes text of it, never markup.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

from moelora_eval_tasks.catalog import TASKS

from ...evaluation.report import show_difference, show_estimate, shown_metrics
from ...text import block
from ..runs import Run
from ..scoreboard import Scoreboard
from .plot import forest_plot
from .sections import documents_of, expert_use_of, expert_use_summary

DOCUMENTS = 200  # of each task on a page, unless it is told otherwise


def render_page(board: Scoreboard, documents: int = DOCUMENTS) -> str:
    """The page of one run or several.

    Args:
        board: the scores.
        documents: how many of each task's documents to show: first those on which models
            disagree, then those that a model has wrong, then others.

    Raises:
        ConfigError: a run's documents are not those that were written with it.
    """
    folder = files(__name__)
    names = ("page.html", "page.css", "page.js")
    sources = {name: (folder / name).read_text(encoding="utf-8") for name in names}
    environment = Environment(
        loader=DictLoader(sources),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"estimate": show_estimate, "difference": show_difference}
    shown = documents_of(board, documents)
    used = expert_use_of(board)
    data = {
        "models": list(board.models),
        "reference": board.reference,
        "tasks": shown,
        "expertUse": used,
    }
    return environment.get_template("page.html").render(
        board=board,
        tasks=TASKS,
        shown_metrics=shown_metrics,
        plot=forest_plot(board),
        p_values=board.p_values,
        documents=shown,
        most=documents,
        used=expert_use_summary(board),
        records={name: _record(run) for name, run in board.runs.items()},
        data=_for_script(data),
    )


def _for_script(data: Any) -> str:
    """JSON in which no tag begins, so that it can stand inside a <script> element."""
    text = json.dumps(_harmless(data), ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _harmless(value: Any) -> Any:
    """Nested values with every text in them, keys too, as the template shows it."""
    if isinstance(value, dict):
        return {_shown(key): _harmless(one) for key, one in value.items()}
    return list(map(_harmless, value)) if isinstance(value, list) else _shown(value)


def _shown(value: Any) -> Any:
    """What the template prints: texts without what a browser would carry out."""
    return block(value) if type(value) is str else value  # not what is markup of ours already


def _record(run: Run) -> str:
    """Everything that is known of a run but its rows."""
    content = {"models": run.models, **run.details}
    del content["expert_use"]
    return json.dumps(content, indent=2, ensure_ascii=False)
