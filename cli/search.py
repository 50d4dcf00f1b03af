"""`moelora search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .display import display
from .options import DataDir, Overwrite, Trust, examples

EXAMPLES = examples(
    "moelora search guilomo recipes/quickstart.yaml --out alloc.json",
    "moelora train recipes/quickstart.yaml adapter.allocation=modules "
    "adapter.allocation_kwargs='{path: alloc.json}'",
)

app = typer.Typer()


@app.callback()
def _search() -> None:
    """Search for an allocation: how many experts, of which rank, each module should get."""


@app.command(epilog=EXAMPLES)
def guilomo(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", metavar="RECIPE.yaml")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSON file to write.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Keys of the recipe to replace; adapter.num_experts and adapter.r are the most "
            "that a module and an expert may get.",
        ),
    ] = None,
    steps: Annotated[
        int,
        typer.Option(
            metavar="N", help="Steps of the experts, and as many of what selects from them."
        ),
    ] = 200,
    lr: Annotated[
        float, typer.Option(metavar="X", help="Learning rate of experts and routers.")
    ] = 3e-4,
    selection_lr: Annotated[
        float, typer.Option(metavar="X", help="Learning rate of the selections.")
    ] = 1e-2,
    trust: Trust = None,
    data_dir: DataDir = None,
    overwrite: Overwrite = False,
) -> None:
    """Learn numbers of experts and ranks by bilevel optimisation (GuiLoMo's first stage)."""
    from moelora_plugin.search.run import guilomo as run
    from moelora_plugin.training import load_recipe

    loaded = load_recipe(recipe, overrides or [], data_dir=data_dir)
    result = run(loaded, out, steps=steps, lr=lr, selection_lr=selection_lr, overwrite=overwrite)
    display(result.table())
