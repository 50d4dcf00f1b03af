"""`moelora train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .display import display
from .options import DataDir, Overwrite, Trust, examples

EXAMPLES = examples(
    "moelora train recipes/quickstart.yaml",
    "moelora train recipes/quickstart.yaml optimizer.lr=3e-5 training.max_steps=200",
    "moelora train recipes/quickstart.yaml --resume last",
)


def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", metavar="RECIPE.yaml")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Keys of the recipe to replace, as in optimizer.lr=1e-4 or data.limit=500.",
        ),
    ] = None,
    data_dir: DataDir = None,
    output_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Folder for the adapter and its checkpoints; replaces output_dir."
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT|last",
            help="Continue from this checkpoint folder, or from the output folder's newest one.",
        ),
    ] = None,
    trust: Trust = None,
    overwrite: Overwrite = False,
) -> None:
    """Train an adapter as a recipe says."""
    from moelora_plugin.training import load_recipe
    from moelora_plugin.training import train as run

    loaded = load_recipe(recipe, overrides or [], data_dir=data_dir, output_dir=output_dir)
    display(run(loaded, overwrite=overwrite, resume=resume).table())
