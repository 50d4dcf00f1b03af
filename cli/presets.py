"""`moelora presets`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from .display import display
from .options import examples

EXAMPLES = examples("moelora presets", "moelora presets gr_moe_lora")


def presets(
    name: Annotated[
        str | None, typer.Argument(help="Show what this preset sets. Default: list them all.")
    ] = None,
) -> None:
    """List the named adapter configurations (`adapter.preset` in a recipe)."""
    from moelora_plugin.lookup import lookup
    from moelora_plugin.presets import PRESETS

    if name is not None:
        preset = lookup("presets", name, PRESETS)
        table = Table("key", "value", title=name)
        for key, value in preset.overrides.items():
            table.add_row(key, Text(str(value)))
        display(preset.summary, f"Source: {preset.source}", table)
        return
    table = Table("preset", "what it is", "source")
    for known, preset in PRESETS.items():
        table.add_row(known, preset.summary, preset.source)
    display(table)
