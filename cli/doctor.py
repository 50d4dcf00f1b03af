"""`moelora doctor`."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from .display import display
from .options import examples

EXAMPLES = examples("moelora doctor")

_STYLES = {"ok": "green", "warning": "yellow", "missing": "red"}


def doctor() -> None:
    """Show versions, registration and devices; what is missing, and how to get it."""
    from moelora_plugin.analysis.doctor import diagnose

    table = Table("what", "status", "found", "what to do")
    for finding in diagnose():
        status = Text(finding.status, style=_STYLES[finding.status])
        # Text, not str: Rich would take the brackets of `pip install moelora[eval]` for markup.
        table.add_row(finding.name, status, Text(finding.detail), Text(finding.remedy))
    display(table)
