"""`moelora report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .display import display
from .options import Overwrite, examples

EXAMPLES = examples(
    "moelora report moelora_eval.json",
    "moelora report runs/a runs/b --out comparison.html",
    "moelora report ours=runs/a lora=runs/b --markdown scores.md",
)


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Files that `moelora eval` has written, or the folders that hold them; NAME=RUN "
            "gives one a name. Several must have been scored on the same rows.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The HTML page to write; it needs no network.")
    ] = Path("report.html"),
    markdown: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the scores as a Markdown table."),
    ] = None,
    documents: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Documents of each task on the page: first those on which models disagree, then "
            "errors.",
        ),
    ] = 200,
    overwrite: Overwrite = False,
) -> None:
    """Show runs as a page: scores, intervals, every answer, experts, provenance."""
    from moelora_plugin.reports import write_reports

    written = write_reports(runs, out, markdown, documents=documents, overwrite=overwrite)
    display(*(f"Written to {path}" for path in written))
