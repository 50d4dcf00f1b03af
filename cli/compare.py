"""`moelora compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .display import display
from .options import Overwrite, examples

EXAMPLES = examples(
    "moelora compare runs/ours runs/lora --reference lora",
    "moelora compare ours=runs/ours-seed{0,1,2} lora=runs/lora-seed{0,1,2} --reference lora",
    "moelora compare runs/moelora_eval.json --output comparison.json",
)


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]RUN...",
            help="Files that `moelora eval` has written, or the folders that hold them. Runs with "
            "the same NAME are training seeds of one recipe and are summed up.",
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Model, or recipe, that the others are compared with. Default: the base, or the "
            "first.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write it to this JSON file too. Default: none."),
    ] = None,
    overwrite: Overwrite = False,
    seed: Annotated[int, typer.Option(help="Seeds the bootstrap behind the intervals.")] = 0,
) -> None:
    """Compare the models of runs on the same rows, or recipes over their training seeds."""
    from moelora_plugin.files import check_out_file, write_json
    from moelora_plugin.reports import Comparison, SeedComparison, compare_seeds, read_runs
    from moelora_plugin.reports import compare as compare_models
    from moelora_plugin.reports.written import holds_comparison

    if output is not None:
        check_out_file(output, overwrite=overwrite, is_ours=holds_comparison, key="--output")
    named = read_runs(runs)
    result: Comparison | SeedComparison
    if any(len(of_name) > 1 for of_name in named.values()):
        result = compare_seeds(named, reference, seed)
    else:
        result = compare_models({name: run for name, (run,) in named.items()}, reference, seed)
    display(*result.tables(), *result.warnings)
    if output is not None:
        write_json(output, result.to_dict())
        display(f"Written to {output}")
