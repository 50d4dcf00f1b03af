"""`moelora tasks`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.panel import Panel

from moelora_plugin.tables import PlainTable, shown
from moelora_plugin.text import plain

from .display import display
from .options import examples

if TYPE_CHECKING:
    from moelora_eval_tasks.catalog import Task

EXAMPLES = examples(
    "moelora tasks", "moelora tasks glue_gen", "moelora tasks sst2_paper --data-dir data"
)

PROTOCOLS = {
    "loglikelihood": "log-likelihood: the likeliest of the answers is the prediction",
    "generation": "generation: the answer is looked for in a text of at most {} tokens",
    "paper": "as in the paper: generation of at most {} tokens, on its rows and with its metric",
}


def tasks(
    name: Annotated[
        str | None,
        typer.Argument(help="Show this task, or the tasks of this group. Default: list them all."),
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(
            envvar="MOELORA_DATA_DIR",
            metavar="DIR",
            help="Folder of local rows, DIR/<dataset>/<split>.parquet, to show one of a task's. "
            "Default: placeholders.",
        ),
    ] = None,
) -> None:
    """List the tasks to train on and to score, or show one with its prompt."""
    from moelora_eval_tasks.catalog import GROUPS, TASKS, canonical, resolve

    if name is None:
        display(_benchmarks(TASKS.values()), _groups(GROUPS))
        return
    known = canonical(name)
    if known in GROUPS:
        display(_members(known, resolve([known])))
        return
    display(_card(TASKS[known]))
    display(*_example(TASKS[known], data_dir))


def _benchmarks(every: Iterable[Task]) -> PlainTable:
    """A line for each benchmark: it has up to three tasks, one for each protocol."""
    from moelora_eval_tasks.task import SUFFIXES

    table = PlainTable(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("benchmark", no_wrap=True)
    table.add_column("what it measures")
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("also as", no_wrap=True)
    names = {task.name for task in every}
    for task in every:
        if not task.generates:
            suffixes = [suffix for suffix in SUFFIXES.values() if suffix]
            also = [suffix for suffix in suffixes if task.benchmark + suffix in names]
            table.add_row(task.name, task.summary, f"{task.eval_rows:,}", " ".join(also))
    table.caption = (
        "A plain name is scored by the likeliest answer. With _gen the answer is written and "
        "looked for in the text; with _paper so too, on the paper's own rows and with its metric."
    )
    table.caption_justify = "left"
    return table


def _groups(groups: dict[str, tuple[str, ...]]) -> PlainTable:
    """The groups, those that hold the same benchmarks on one line."""
    from moelora_eval_tasks.catalog import TASKS

    table = PlainTable("groups", "their benchmarks", box=SIMPLE_HEAD, pad_edge=False)
    names: dict[tuple[str, ...], list[str]] = {}
    for group, members in groups.items():
        names.setdefault(tuple(TASKS[member].benchmark for member in members), []).append(group)
    for members, same in names.items():
        table.add_row(" ".join(same), " ".join(members))
    return table


def _members(group: str, chosen: list[Task]) -> PlainTable:
    table = PlainTable(title=group, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", no_wrap=True)
    table.add_column("what it measures")
    table.add_column("metric")
    table.add_column("rows", justify="right", no_wrap=True)
    for task in chosen:
        table.add_row(task.name, task.summary, " ".join(task.metrics), f"{task.eval_rows:,}")
    table.caption = "The group's score is the unweighted mean of its tasks' scores."
    table.caption_justify = "left"
    return table


def _card(task: Task) -> PlainTable:
    from moelora_eval_tasks.catalog import TASKS

    table = PlainTable(title=task.name, show_header=False)
    sources = [TASKS[name] for name in task.parts] or [task]
    splits = " + ".join(dict.fromkeys(source.eval_split for source in sources))
    facts = {
        "measures": task.summary,
        "protocol": PROTOCOLS[task.protocol].format(task.max_new_tokens),
        "metric": ", ".join(task.metrics)
        + (f"; the score is the mean of {' and '.join(task.scored)}" * (len(task.scored) > 1)),
        "trained on": _split(task.train_split, task.train_slice),
        "scored on": f"{_split(splits, task.eval_slice)}: {task.eval_rows:,} rows",
        "broken down by": task.category,
        "columns": ", ".join(task.columns),
        "on the hub": _dataset(task),
        "in --data-dir": "\n".join(
            dict.fromkeys(f"{source.folder}/<split>.parquet" for source in sources)
        ),
    }
    for key, value in facts.items():
        if value:
            table.add_row(key, shown(value))
    return table


def _example(task: Task, data_dir: str | None) -> tuple[Panel, Panel]:
    """The prompt of a row and its answers: a real one, or one that says what stands where."""
    from moelora_eval_tasks.prompts import render

    if data_dir is None:
        title, row = "prompt, with placeholders", _placeholder_row(task)
    else:
        from moelora_eval_tasks.loading import load_split

        title = f"prompt of the first row in {data_dir}"
        row = load_split(task, task.eval_split, data_dir)[0]
    prompt = render(task, row)
    answers = "\n".join(map(str.strip, prompt.choices))
    right = None if data_dir is None else f"right: {prompt.choices[prompt.gold].strip()}"
    return (
        Panel(shown(prompt.context.rstrip()), title=shown(title)),
        Panel(shown(answers, "green"), title="answers", subtitle=right and shown(plain(right))),
    )


def _split(name: str | None, rows: str) -> str:
    if name is None:
        return "nothing: all labelled rows are scored"
    return name if rows == ":" else f"{name} [{rows}]"


def _dataset(task: Task) -> str:
    if task.hub_id is None:
        return "no: `moelora data prepare` makes its files"
    config = "" if task.config is None else f" ({task.config})"
    return f"{task.hub_id}{config}\nrevision {task.revision}"


def _placeholder_row(task: Task) -> dict[str, Any]:
    """A row that says in each column what real rows hold there."""
    row: dict[str, Any] = {column: f"<{column}>" for column in task.columns}
    row |= {column: f"<{title.lower()}>" for title, column in task.inputs}
    texts = [f"<{number} option>" for number in ("first", "second", "third", "fourth")]
    row[task.label] = task.labels[0] if task.labels else 0
    if len(task.options) == 1:
        row[task.options[0]] = texts
    else:
        row.update(zip(task.options, texts, strict=False))
    return row
