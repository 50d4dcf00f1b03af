"""`moelora export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .display import display
from .options import Base, DataDir, DType, Overwrite, Trust, examples, names

EXAMPLES = examples(
    "moelora export runs/quickstart/adapter --out shared --eval-file moelora_eval.json",
    "moelora export runs/quickstart/adapter --out shared --push-to-hub me/sst2-moelora",
    "moelora export runs/quickstart/adapter --to merged --strategy mean-gate "
    "--calibration-tasks sst2 --out merged",
)


def export(
    adapter: Annotated[
        str, typer.Argument(help="Folder or hub id of a saved adapter.", metavar="ADAPTER")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="safetensors: the adapter with a model card. merged: a full checkpoint that needs "
            "no adapter.",
        ),
    ] = "safetensors",
    strategy: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="For --to merged. exact: only where the gates do not depend on the input. "
            "mean-gate: an approximation, each expert with its mean gate on calibration text; "
            "its error is printed.",
        ),
    ] = "exact",
    base: Base = None,
    eval_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A moelora_eval.json; its scores go on the model card."),
    ] = None,
    calibration_tasks: Annotated[
        str,
        typer.Option(metavar="NAMES", help="Tasks whose training rows mean-gate averages over."),
    ] = "",
    trust: Trust = None,
    data_dir: DataDir = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="USER/NAME", help="Upload the result to this model repository."),
    ] = None,
    overwrite: Overwrite = False,
    dtype: DType = "auto",
) -> None:
    """Write an adapter for others: shareable safetensors, or merged into its base."""
    from moelora_plugin.export import export_adapter

    result = export_adapter(
        adapter,
        out,
        to=to,
        strategy=strategy,
        base=base,
        eval_file=eval_file,
        calibration_tasks=names(calibration_tasks),
        data_dir=data_dir,
        push_to_hub=push_to_hub,
        overwrite=overwrite,
        dtype=dtype,
    )
    display(result.table())
