"""`moelora data`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .display import display
from .options import Overwrite, examples

EXAMPLES = examples(
    "moelora data prepare visual7w --from downloads --out data",
    "moelora eval --adapter runs/vision/adapter --tasks visual7w --data-dir data",
)

app = typer.Typer()
prepare = typer.Typer()
app.add_typer(prepare, name="prepare", epilog=EXAMPLES)


@app.callback()
def _data() -> None:
    """Make the local files of a dataset that is not on the hub."""


@prepare.callback()
def _prepare() -> None:
    """Make a dataset's official files into the folder that --data-dir names."""


@prepare.command(epilog=EXAMPLES)
def visual7w(
    source: Annotated[
        Path,
        typer.Option(
            "--from",
            metavar="DIR",
            help="Folder with the downloads: dataset_v7w_telling.json or .zip, and "
            "visual7w_images.zip or the folder images that it unpacks to.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Data folder; DIR/visual7w is written, whole or not."),
    ],
    overwrite: Overwrite = False,
) -> None:
    """Prepare Visual7W's telling questions: a parquet file per split, and the images beside them.

    The downloads are at ai.stanford.edu/~yukez/papers/resources/dataset_v7w_telling.zip and
    vision.stanford.edu/yukezhu/visual7w_images.zip; each image is checked as it is copied.
    """
    from rich.console import Console
    from rich.progress import track

    from moelora_eval_tasks.visual7w.prepare import prepare as run

    progress = partial(track, description="Copying images", console=Console(stderr=True))
    prepared = run(source, out, overwrite=overwrite, progress=progress)
    rows = ", ".join(f"{count} {split}" for split, count in prepared.rows.items())
    display(f"Written to {prepared.folder}: {rows} questions about {prepared.images} images")
