"""`moelora eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .display import display
from .options import Base, DataDir, DType, Overwrite, Trust, examples, names

EXAMPLES = examples(
    "moelora eval --adapter runs/quickstart/adapter --tasks sst2 --compare-base",
    "moelora eval --adapter runs/quickstart/adapter --tasks glue,commonsenseqa --limit 200",
    "moelora eval --base HuggingFaceTB/SmolLM2-135M-Instruct --tasks qa",
    "accelerate launch -m moelora_cli eval --adapter runs/quickstart/adapter --tasks glue",
)


def evaluate(
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Tasks and groups, separated by commas; `moelora tasks` lists them.",
        ),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Folder or hub id of an adapter; give it again for more, on one load of the base. "
            "Without it, --base alone.",
        ),
    ] = None,
    base: Base = None,
    data_dir: DataDir = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Rows per task, drawn with the seed. Default: all; set it to try."),
    ] = None,
    batch_size: Annotated[
        str,
        typer.Option(
            metavar="ROWS",
            help="Rows per forward pass, or auto; changes the speed, not the scores.",
        ),
    ] = "auto",
    compare_base: Annotated[
        bool,
        typer.Option(
            "--compare-base",
            help="Score the base on the same rows too, and show the paired difference.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The JSON to write. Default: moelora_eval.json."),
    ] = None,
    overwrite: Overwrite = False,
    dtype: DType = "auto",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps. Default: the best that is there.")
    ] = None,
    guess: Annotated[
        bool,
        typer.Option(
            "--guess",
            help="Guess, with the seed, where no answer is found in what was written. Default: "
            "that counts as wrong.",
        ),
    ] = False,
    seed: Annotated[
        int, typer.Option(help="Seeds the draw of --limit, the guesses and the intervals.")
    ] = 0,
    trust: Trust = None,
    allow_base_mismatch: Annotated[
        bool,
        typer.Option(
            "--allow-base-mismatch",
            help="Go on although --base is not the model that the adapter was trained on.",
        ),
    ] = False,
    no_cache: Annotated[
        bool,
        typer.Option(
            "--no-cache",
            help="Answer everything anew. Default: answers are kept in ~/.cache/moelora, or in "
            "MOELORA_CACHE, so that a run that was interrupted goes on where it was.",
        ),
    ] = False,
) -> None:
    """Score an adapter on tasks, beside its base if asked."""
    from moelora_plugin.evaluation import EvaluationRequest
    from moelora_plugin.evaluation import evaluate as run

    request = EvaluationRequest(
        tasks=names(tasks),
        adapters=tuple(adapter or ()),
        base=base,
        data_dir=data_dir,
        limit=limit,
        batch_size=int(batch_size) if batch_size.isdecimal() else batch_size,
        compare_base=compare_base,
        dtype=dtype,
        device=device,
        guess=guess,
        seed=seed,
        output=output,
        overwrite=overwrite,
        allow_base_mismatch=allow_base_mismatch,
        cache=not no_cache,
    )
    try:
        report = run(request)
    except KeyboardInterrupt:  # a line has said what is kept
        raise typer.Exit(130) from None
    if report.path is not None:  # in the first of several processes
        display(report.table(), f"Written to {report.path}")
