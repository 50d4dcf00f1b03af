"""Compare the models of several runs, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moelora_eval_tasks.catalog import GROUPS, resolve
from moelora_eval_tasks.metrics import Array
from moelora_eval_tasks.scoring import SCORE

from ..errors import ConfigError
from ..evaluation.report import NOISE_MARK, cautions, show_difference, show_estimate
from ..evaluation.request import DEFAULT_OUTPUT
from ..evaluation.statistics import Measurement, combine, holm, measure
from ..evaluation.subjects import BASE
from ..lookup import unknown_name_message
from .runs import Run, read_run

if TYPE_CHECKING:
    from ..tables import PlainTable


@dataclass(frozen=True)
class Comparison:
    """Models that were scored on the same rows, perhaps in different runs.

    Attributes:
        models: by name the run that a model was scored in, and its name there.
        reference: the model that the others are compared with.
        tasks: what the models came out at on each task that all runs have.
        groups: likewise on each group of tasks that all runs have.
        left_out: tasks that some run lacks.
        adjusted: by task and model McNemar's p-value after Holm's adjustment for all of them.
    """

    models: dict[str, tuple[Run, str]]
    reference: str
    tasks: dict[str, Measurement]
    groups: dict[str, Measurement]
    left_out: tuple[str, ...] = ()
    adjusted: dict[tuple[str, str], float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "adjusted", mcnemar_p_values(self.tasks))

    def tables(self) -> list[PlainTable]:
        """For the terminal, in points (times 100)."""
        p = "p (Holm)" if len(self.adjusted) > 1 else "p"
        table = table_of(
            f"Scores x 100 ± standard error; difference from {self.reference} [95 %], "
            f"{NOISE_MARK} within noise",
            *("Task", "Model", ">Score", ">Difference", f">{p}"),
        )
        for name, measured in (*self.tasks.items(), *self.groups.items()):
            table.add_section()
            for model, metrics in measured.metrics.items():
                score, difference = metrics[SCORE], measured.differences.get(model)
                p_value = self.adjusted.get((name, model))
                table.add_row(
                    name if model == next(iter(measured.metrics)) else "",
                    model,
                    show_estimate(score),
                    "" if difference is None else show_difference(difference),
                    "" if p_value is None else f"{p_value:.2g}",
                )
        return [table]

    @property
    def warnings(self) -> list[str]:
        """What must be known before the scores are quoted, a sentence each."""
        overlap = {
            name: run.details.get("overlap", {}).get(model, {})
            for name, (run, model) in self.models.items()
        }
        (first, _), *_ = self.models.values()
        return [
            *cautions(self.tasks, self.groups, {**first.details, "overlap": overlap}),
            *left_out_note(self.left_out),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The content of the JSON file."""
        tasks = {name: one.to_dict() for name, one in self.tasks.items()}
        for (task, model), p_value in self.adjusted.items():
            tasks[task]["differences"][model]["p_value_holm"] = p_value
        return {
            "models": {
                name: {"file": str(run.path), "model": model}
                for name, (run, model) in self.models.items()
            },
            "reference": self.reference,
            "tasks": tasks,
            "groups": {name: one.to_dict() for name, one in self.groups.items()},
            "left_out": list(self.left_out),
        }


def read_runs(arguments: Sequence[str]) -> dict[str, list[Run]]:
    """The runs that a command line names, by name.

    Args:
        arguments: each a file of `moelora eval`, the folder that holds it, or either with a name
            before it ("ours=runs/ours-seed0"). Without one, a run goes by the shortest end of its
            path that tells it from the others.

    Raises:
        ConfigError: a file is not what it should be, or is given twice.
    """
    named = [_split(argument) for argument in arguments]
    runs = [read_run(path) for _, path in named]
    files = [run.path.resolve() for run in runs]
    if doubled := [
        run.path for run, file in zip(runs, files, strict=True) if files.count(file) > 1
    ]:
        raise ConfigError(f"{doubled[0]} is given twice; name each run once.")
    short_names = iter(
        _short_names([file for (name, _), file in zip(named, files, strict=True) if name is None])
    )
    found: dict[str, list[Run]] = {}
    for (name, _), run in zip(named, runs, strict=True):
        found.setdefault(name or next(short_names), []).append(run)
    return found


def compare(runs: Mapping[str, Run], reference: str | None = None, seed: int = 0) -> Comparison:
    """Compare the models of runs with one of them.

    Of several runs, the only adapter of a run goes by the run's name, one of many by "run/adapter".
    Bases that predict the same on every row are one, "base".

    Args:
        runs: the runs by name.
        reference: name of a model; None takes the base, or the first model where there is none.
        seed: of the bootstrap.

    Raises:
        ConfigError: the runs have no task in common or were not scored on the same rows, there is
            one model only, or none is called `reference`.
    """
    common, left_out = common_tasks(runs)
    models = _name_models(runs, common)
    if len(models) < 2:
        raise ConfigError(f"There is nothing to compare {next(iter(models))} with; name more runs.")
    if reference is None:
        bases = (name for name, (_, model) in models.items() if model == BASE)
        reference = next(bases, next(iter(models)))
    if reference not in models:
        raise ConfigError(unknown_name_message("model", reference, models))
    tasks, groups = measure_all(models, common, reference, seed)
    return Comparison(models, reference, tasks, groups, left_out)


def common_tasks(runs: Mapping[str, Run]) -> tuple[list[str], tuple[str, ...]]:
    """The tasks that all runs have, on the same rows, and those that some lack.

    Raises:
        ConfigError: there is none, or a task's rows or prompts differ between runs.
    """
    (first_name, first), *others = runs.items()
    seen = dict.fromkeys(task for run in runs.values() for task in run.predictions)
    common = [task for task in seen if all(task in run.predictions for run in runs.values())]
    if not common:
        raise ConfigError("The runs have no task in common; name runs of the same tasks.")
    for task in common:
        rows = first.predictions[task]
        for name, run in others:
            theirs = run.predictions[task]
            same_prompts = rows.prompts_sha256 == theirs.prompts_sha256
            if not (same_prompts and np.array_equal(rows.label, theirs.label)):
                raise ConfigError(
                    f"{first_name} and {name} were not scored on the same rows and prompts of "
                    f"{task}, so they cannot be compared; run `moelora eval` on both with the same "
                    "--limit, --seed and --data-dir and the same version of moelora."
                )
    return common, tuple(task for task in seen if task not in common)


def measure_all(
    models: Mapping[str, tuple[Run, str]],
    tasks: Sequence[str],
    reference: str | None,
    seed: int,
) -> tuple[dict[str, Measurement], dict[str, Measurement]]:
    """Score models of several runs on rows that all of them have.

    Args:
        models: by name a run and the model's name in it.
        tasks: as `common_tasks` found them.
        reference: name of the model that the others are compared with.
        seed: of the bootstrap.

    Returns:
        Measurements of the tasks, and of the groups that all runs were asked for.
    """
    (first, _), *_ = models.values()
    measured = {}
    for task in resolve(tasks):
        preds: dict[str, Array] = {
            name: run.predictions[task.name].preds[model] for name, (run, model) in models.items()
        }
        label = first.predictions[task.name].label
        measured[task.name] = measure(task, label, preds, reference, seed)
    asked = [
        group for group in first.groups if all(group in run.groups for run, _ in models.values())
    ]
    groups = {
        group: combine([measured[name] for name in GROUPS[group]])
        for group in asked  # in another version it may have had other tasks
        if group in GROUPS and set(GROUPS[group]) <= set(measured)
    }
    return measured, groups


def mcnemar_p_values(tasks: Mapping[str, Measurement]) -> dict[tuple[str, str], float]:
    """By task and model McNemar's p-value after Holm's adjustment for all of them."""
    return holm(
        {
            (task, model): difference.p_value
            for task, measured in tasks.items()
            for model, difference in measured.differences.items()
            if difference.p_value is not None
        }
    )


def table_of(title: str, *columns: str) -> PlainTable:
    """An empty table for 80 columns; ">" before a column's name puts its cells to the right."""
    from rich.box import SIMPLE_HEAD

    from ..tables import PlainTable

    table = PlainTable(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in columns:
        right = name.startswith(">")
        table.add_column(
            name.removeprefix(">"),
            justify="right" if right else "left",
            no_wrap=right,
            overflow="fold",
        )
    return table


def show_interval(low: float, high: float) -> str:
    """In points."""
    return f"[{100 * low:+.2f}, {100 * high:+.2f}]"


def left_out_note(tasks: Sequence[str]) -> list[str]:
    """The line that says so, where tasks are left out."""
    return [f"Left out, as not all runs have them: {', '.join(tasks)}."] if tasks else []


def _split(argument: str) -> tuple[str | None, str]:
    """The name and the path of "NAME=PATH"."""
    name, equals, path = argument.partition("=")
    if not equals or "/" in name or Path(argument).exists():
        return None, argument
    return name, path


def _short_names(files: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart, without the usual file's name."""
    parts = [
        file.parent.parts if file.name == DEFAULT_OUTPUT else file.with_suffix("").parts
        for file in files
    ]
    longest = max(map(len, parts), default=0)
    ends = (["/".join(one[-length:]) for one in parts] for length in range(1, longest + 1))
    return next((names for names in ends if len(set(names)) == len(names)), list(map(str, files)))


def _name_models(runs: Mapping[str, Run], tasks: Sequence[str]) -> dict[str, tuple[Run, str]]:
    """The models of all runs, by the names that `compare` gives them."""
    models = {name: list(run.predictions[tasks[0]].preds) for name, run in runs.items()}
    if len(runs) == 1:
        ((run, names),) = models.items()
        return {name: (runs[run], name) for name in names}
    with_base = [run for run, names in models.items() if BASE in names]
    one_base = all(_same_base(runs[with_base[0]], runs[run], tasks) for run in with_base)
    found: dict[str, tuple[Run, str]] = {}
    for run, names in models.items():
        for model in names:
            if model == BASE and one_base:
                found.setdefault(BASE, (runs[run], BASE))
            elif len(set(names) - {BASE}) == 1 and BASE not in (model, run):
                found[run] = (runs[run], model)
            else:
                found[f"{run}/{model}"] = (runs[run], model)
    return found


def _same_base(run: Run, other: Run, tasks: Sequence[str]) -> bool:
    """Whether the bases of two runs predict the same on every row."""
    pairs = ((one.predictions[task].preds[BASE] for one in (run, other)) for task in tasks)
    return all(np.array_equal(first, second) for first, second in pairs)
