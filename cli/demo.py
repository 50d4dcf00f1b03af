"""`moelora demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .display import display
from .options import DataDir, Overwrite, examples

EXAMPLES = examples("moelora demo", "moelora demo --out /tmp/demo --steps 20")


def demo(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for everything that the demo writes.")
    ] = Path("moelora_demo"),
    data_dir: DataDir = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps. Default: about five minutes' worth.")
    ] = None,
    overwrite: Overwrite = False,
    seed: Annotated[int, typer.Option(help="Seeds the adapter, the rows and their order.")] = 0,
) -> None:
    """Train, evaluate and export an adapter on a small real model, on any machine, in minutes."""
    from moelora_plugin.demo import run_demo

    display(run_demo(out, data_dir=data_dir, steps=steps, overwrite=overwrite, seed=seed).table())
