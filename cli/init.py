"""`moelora init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .display import display
from .options import DataDir, Overwrite, examples

EXAMPLES = examples(
    "moelora init llamafactory",
    "moelora init axolotl --preset gr --model meta-llama/Llama-3.2-3B --task commonsenseqa",
    "moelora init trl-dpo --data preferences.jsonl --out dpo",
)


def init(
    host: Annotated[
        str,
        typer.Argument(
            metavar="HOST",
            help="llamafactory, llamafactory-v1, axolotl, ms-swift, trl, trl-dpo or transformers.",
        ),
    ],
    preset: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="The adapter, and with it the optimizer; `moelora presets` lists them. gr and r "
            "stand for gr_moe_lora (with gradamw) and r_moe_lora (with radamw).",
        ),
    ] = "gr_moe_lora",
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="Base model, a local path or a hub id.")
    ] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Train on this task's training split; `moelora tasks` lists them. Default: a "
            "small sample in the form of sst2 that moelora ships.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Train on this JSONL file: prompt and completion in each row (for trl-dpo prompt, "
            "chosen and rejected), texts that go to the model as they are.",
        ),
    ] = None,
    data_dir: DataDir = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to write. Default: moelora-HOST."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a complete config for the program you train with, and the rows to start with.

    Prints the commands that follow, to be run in the folder it writes.
    """
    from moelora_plugin.integrations.init import write_config

    written = write_config(
        host,
        preset=preset,
        model=model,
        task=task,
        data=data,
        data_dir=data_dir,
        out=out,
        overwrite=overwrite,
    )
    display(
        f"Written to {written.folder}: {', '.join(written.files)}",
        f"Trains on {written.rows}",
        "Next:",
        *(f"  {command}" for command in written.commands),
    )
