"""Options that several commands share, so that each is described once and means one thing."""

from __future__ import annotations

from typing import Annotated

import typer

DataDir = Annotated[
    str | None,
    typer.Option(
        envvar="MOELORA_DATA_DIR",
        metavar="DIR",
        help="Folder of local rows, DIR/<dataset>/<split>.parquet. Default: the hub.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what the output already holds.")
]
DType = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="Precision of the weights: float32, bfloat16, float16 or auto."
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Base model, a local path or a hub id. Default: the one that the adapter records.",
    ),
]


def _trust(paths: list[str] | None) -> None:
    from moelora_plugin.families import trust

    for path in paths or []:
        trust(path)


Trust = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]PACKAGE.MODULE.NAME",
        callback=_trust,
        help="A router, loss, ... of somebody's own that a saved adapter names: import it, which "
        "runs its code. Give it again for more. Default: only what is built in or installed.",
    ),
]


def names(text: str) -> tuple[str, ...]:
    """The names in a comma-separated option ("glue, siqa")."""
    return tuple(name for part in text.split(",") if (name := part.strip()))


def examples(*lines: str) -> str:
    """An epilog of command lines to copy; the blank lines keep each on a line of its own."""
    return "\n\n".join(("Examples:", *lines))
