"""`moelora doctor`."""

from __future__ import annotations

from moelora_plugin.tables import PlainTable, shown

from .display import display
from .options import examples

EXAMPLES = examples("moelora doctor")

_STYLES = {"ok": "green", "warning": "yellow", "missing": "red"}


def doctor() -> None:
    """Show versions, registration and devices; what is missing, and how to get it."""
    from moelora_plugin.analysis.doctor import diagnose

    table = PlainTable("what", "status", "found", "what to do")
    for finding in diagnose():
        status = shown(finding.status, _STYLES[finding.status])
        table.add_row(finding.name, status, finding.detail, finding.remedy)
    display(table)
