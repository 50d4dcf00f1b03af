"""How far an evaluation is, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as Bar
from rich.text import Text

from ..text import plain


class EvaluationProgress:
    """A bar over all rows of all models, and above it a line for each task that is finished.

    Without a terminal there is no bar, only the lines.
    """

    def __init__(self, total_rows: int, *, is_shown: bool = True) -> None:
        """Begin at none of `total_rows`; a process that is not the first shows nothing."""
        self._console = Console(stderr=True, quiet=not is_shown, soft_wrap=True, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} rows"),
            _Rate(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._bar = self._bars.add_task("loading", total=total_rows)

    def start(self) -> None:
        """Show the bar."""
        self._bars.start()

    def stop(self) -> None:
        """Take it away."""
        self._bars.stop()

    @contextmanager
    def task(self, model: str, task: str, rows: int) -> Iterator[Callable[[float], None]]:
        """Show that a model is answering a task.

        Yields:
            To be told of each share (0 to 1) of the task that is done.
        """
        before = self._bars.tasks[self._bar].completed
        self._bars.update(self._bar, description=plain(f"{model} · {task}"))
        yield lambda share: self._bars.advance(self._bar, share * rows)
        self._bars.update(self._bar, completed=before + rows)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(plain(line), markup=False, emoji=False)


class _Rate(ProgressColumn):
    """Rows per second."""

    def render(self, task: Bar) -> Text:
        """The rate, where enough is known of it."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} rows/s")
