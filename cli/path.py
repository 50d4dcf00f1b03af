"""`moelora path`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Column

from moelora_plugin.tables import PlainTable

from .display import display
from .options import examples

EXAMPLES = examples(
    'swift sft --external_plugins "$(moelora path ms-swift)" --tuner_type moelora ...',
    "moelora path",
)

_FILES = {
    "ms-swift": ("integrations/ms_swift/external_plugin.py", "swift sft --external_plugins FILE"),
}


def path(
    name: Annotated[
        str | None, typer.Argument(help="Print the path of this file. Default: list them all.")
    ] = None,
) -> None:
    """Print where a file lies that a host's own setting wants to be told."""
    from pathlib import Path

    import moelora_plugin
    from moelora_plugin.errors import ConfigError
    from moelora_plugin.lookup import unknown_name_message

    home = Path(moelora_plugin.__file__).absolute().parent
    if name is None:
        table = PlainTable("name", "what it is for", Column("file", overflow="fold"))
        for known, (file, use) in _FILES.items():
            table.add_row(known, use, str(home / file))
        display(table)
        return
    if name not in _FILES:
        raise ConfigError(unknown_name_message("file", name, _FILES))
    display(str(home / _FILES[name][0]))
