"""What the commands print with: results on stdout, one line for an error on stderr."""

from __future__ import annotations

import os
import time

from rich.console import Console, RenderableType

from moelora_plugin.text import block, plain

_LAUNCHER_SECONDS = 30  # the first takes some to leave Python, on a busy machine


def display(*renderables: RenderableType) -> None:
    """Print to stdout; colours and borders adapt to a terminal, a pipe or a file.

    A string is a line, shown as it is.
    """
    console = Console()
    for renderable in renderables:
        if isinstance(renderable, str):
            _print(console, plain(renderable))
        else:
            console.print(renderable)


def display_block(text: str) -> None:
    """Print several lines to stdout, as they are."""
    _print(Console(), block(text))


def display_error(error: Exception) -> None:
    """Print an error as one red line to stderr.

    Of several processes most often all have the same to say. The launcher ends the others when the
    first does, so those give it the time to.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_LAUNCHER_SECONDS)
    _print(Console(stderr=True), f"Error: {' '.join(plain(error).split())}", style="red")


def _print(console: Console, text: str, style: str | None = None) -> None:
    # As it stands: brackets in it are no markup, and paths must not break where they are copied.
    console.print(text, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)
