"""`moelora tasks`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .display import display
from .options import examples

if TYPE_CHECKING:
    from moelora_eval_tasks.catalog import Task

EXAMPLES = examples("moelora tasks", "moelora tasks sst2", "moelora tasks glue")


def tasks(
    name: Annotated[
        str | None,
        typer.Argument(help="Show this task, or the tasks of this group. Default: list them all."),
    ] = None,
) -> None:
    """List the tasks to train on and to score, or show one with its prompt."""
    from moelora_eval_tasks.catalog import GROUPS, TASKS, canonical, resolve

    known = None if name is None else canonical(name)
    if known in TASKS:
        display(_card(TASKS[known]), _prompt(TASKS[known]))
        return
    display(_list(list(TASKS.values()) if known is None else resolve([known])))
    if known is None:
        display(*(f"group {group}: {', '.join(members)}" for group, members in GROUPS.items()))


def _list(chosen: list[Task]) -> Table:
    table = Table(
        box=SIMPLE_HEAD, caption="All but mnli_mismatched are trained on their split `train`."
    )
    table.add_column("task", no_wrap=True)
    table.add_column("what it measures", ratio=3)
    table.add_column("metric")
    table.add_column("scored on", overflow="fold")
    table.add_column("dataset", ratio=2, overflow="fold")
    for task in chosen:
        rows = f"{task.eval_split} ({task.eval_rows})"
        table.add_row(task.name, task.summary, "\n".join(task.metrics), rows, _dataset(task))
    return table


def _card(task: Task) -> Table:
    table = Table(title=task.name, show_header=False)
    for key, value in (
        ("measures", task.summary),
        ("dataset", _dataset(task)),
        ("revision", task.revision),
        ("folder in --data-dir", task.folder),
        ("trained on", "train"),
        ("scored on", f"{task.eval_split}, {task.eval_rows} rows"),
        ("columns", ", ".join(task.columns)),
        ("metric", ", ".join(task.metrics)),
    ):
        table.add_row(key, value)
    return table


def _prompt(task: Task) -> Panel:
    from moelora_eval_tasks.prompts import render

    prompt = render(task, _placeholder_row(task))
    answers = Text(" |".join(prompt.choices), style="green")
    return Panel(Text(prompt.context) + answers, title="prompt, and the answers it chooses from")


def _dataset(task: Task) -> str:
    return task.hub_id if task.config is None else f"{task.hub_id} ({task.config})"


def _placeholder_row(task: Task) -> dict[str, Any]:
    """A row that says in each column what real rows hold there."""
    row: dict[str, Any] = {column: f"<{title.lower()}>" for title, column in task.inputs}
    texts = ["<first option>", "<second option>", "<third option>"]
    row[task.label] = task.labels[0] if task.labels else 0
    if len(task.options) == 1:
        row[task.options[0]] = texts
    else:
        row.update(zip(task.options, texts, strict=False))
    return row
