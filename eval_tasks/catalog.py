"""All tasks and groups, by name.

A benchmark is a folder of this package: its tasks (one per protocol), a README, and one YAML file
per task that shows it to lm-eval. To add a benchmark, add a folder and a line here; the contract
tests pick it up. `prompts` renders a task, `loading` reads it, `scoring` scores it. Standard
library only: listing tasks loads nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from moelora_plugin.errors import ConfigError
from moelora_plugin.lookup import unknown_name_message

from . import commonsenseqa, glue, openbookqa, scienceqa, siqa, visual7w, vmcbench
from .task import SUFFIXES, Task

__all__ = ["GROUPS", "TASKS", "Task", "canonical", "resolve"]

PREFIX = "moelora_"  # of our names in lm-eval, which has tasks of the plain names itself

BENCHMARKS = (scienceqa, commonsenseqa, openbookqa, siqa, glue, vmcbench, visual7w)

TASKS: dict[str, Task] = {task.name: task for one in BENCHMARKS for task in one.TASKS}

_QA = ("scienceqa", "commonsenseqa", "openbookqa", "siqa")
_GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
_TEXT = (*_QA, *_GLUE)
_VISION = ("scienceqa_image", "vmcbench", "visual7w")


def _each(benchmarks: tuple[str, ...], suffix: str) -> tuple[str, ...]:
    return tuple(benchmark + suffix for benchmark in benchmarks)


GROUPS: dict[str, tuple[str, ...]] = {
    "qa": _QA,
    "qa_gen": _each(_QA, "_gen"),
    "qa_paper": _each(_QA, "_paper"),
    "glue": _GLUE,
    "glue_gen": _each(_GLUE, "_gen"),
    "glue_paper": _each(_GLUE, "_paper"),
    "text": _TEXT,
    "text_gen": _each(_TEXT, "_gen"),
    "paper": _each(_TEXT, "_paper"),
    "vision": _VISION,
    "vision_gen": _each(_VISION, "_gen"),
    "paper_vision": ("vmcbench_paper", "visual7w_paper"),
}


def _squash(name: str) -> str:
    """The spelling-independent form of a name: "SST-2", "sst_2" and "moelora_sst2" are one."""
    return "".join(filter(str.isalnum, name.lower().removeprefix(PREFIX)))


_SPELLINGS = {
    **{  # a folder that tasks share stands for the first of them
        _squash(spelling + SUFFIXES[task.protocol]): task.name
        for task in reversed(TASKS.values())
        for spelling in (task.folder, *task.spellings)
    },
    **{_squash(name): name for name in (*TASKS, *GROUPS)},
    "all": "text",
}


def canonical(name: str) -> str:
    """The name of the task or group that `name` is a spelling of.

    Raises:
        ConfigError: there is none; the message offers the nearest names.
    """
    try:
        return _SPELLINGS[_squash(name)]
    except KeyError:
        raise ConfigError(unknown_name_message("task", name, (*TASKS, *GROUPS))) from None


def resolve(names: Iterable[str]) -> list[Task]:
    """The tasks that `names` stand for, each once, in the order given.

    Args:
        names: tasks and groups in any common spelling ("glue", "social_iqa", "moelora_sst2").

    Raises:
        ConfigError: no name is given, or one is unknown.
    """
    known = [canonical(name) for name in names]
    if not known:
        raise ConfigError("No task is given; name some of those that `moelora tasks` lists.")
    return [TASKS[name] for name in dict.fromkeys(n for k in known for n in GROUPS.get(k, (k,)))]
