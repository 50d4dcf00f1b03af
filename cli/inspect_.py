"""`moelora inspect`. The underscore keeps the standard library's `inspect` in plain sight."""

from __future__ import annotations

from typing import Annotated

import typer

from .display import display
from .options import Trust, examples

EXAMPLES = examples("moelora inspect runs/quickstart/adapter")


def inspect(
    adapter: Annotated[
        str, typer.Argument(help="Folder or hub id of a saved adapter.", metavar="ADAPTER")
    ],
    trust: Trust = None,
) -> None:
    """Show an adapter's experts, ranks, parameters and, where logged, router statistics."""
    from moelora_plugin.analysis import inspect_adapter

    display(inspect_adapter(adapter).table())
