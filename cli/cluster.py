"""`moelora cluster`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .display import display
from .options import DataDir, Overwrite, Trust, examples

EXAMPLES = examples(
    "moelora cluster recipes/quickstart.yaml --num-clusters 8 --out clusters",
    "moelora cluster recipes/quickstart.yaml --method gradient --num-clusters 8 --out clusters",
    "moelora train recipes/quickstart.yaml adapter.preset=mocle data.clusters=clusters",
)


def cluster(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", metavar="RECIPE.yaml")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Keys of the recipe to replace, as in data.limit=500 or seed=1.",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="embedding: by what the base makes of the prompt (MoCLE). gradient: by where the "
            "prompt would move a LoRA (ELREA).",
        ),
    ] = "embedding",
    num_clusters: Annotated[int, typer.Option(metavar="N", help="How many clusters.")] = 64,
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="Prompts at once through the base.")
    ] = 8,
    trust: Trust = None,
    data_dir: DataDir = None,
    overwrite: Overwrite = False,
) -> None:
    """Cluster a recipe's training prompts, for adapters with router_input: cluster."""
    from moelora_plugin.training import load_recipe
    from moelora_plugin.training.clustering import cluster as run

    # The recipe may name the folder that is about to be made.
    keys = ["data.clusters=null", *(overrides or [])]
    loaded = load_recipe(recipe, keys, data_dir=data_dir)
    result = run(
        loaded,
        out,
        method=method,
        num_clusters=num_clusters,
        batch_size=batch_size,
        overwrite=overwrite,
    )
    display(result.table())
