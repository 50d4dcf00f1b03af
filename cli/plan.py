"""`moelora plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .display import display, display_block
from .options import Trust, examples

EXAMPLES = examples(
    "moelora plan --model HuggingFaceTB/SmolLM2-135M --preset mola",
    "moelora plan --model models/Llama-3.2-3B --preset gr_moe_lora "
    "adapter.r=8 --dtype bfloat16 --batch-size 4 --length 1024",
    "moelora plan recipes/quickstart.yaml adapter.num_experts=8 --json",
)


def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE.yaml] [KEY=VALUE]...",
            help="A recipe, and keys of it to replace, as `moelora train` takes them.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Base model, a local path or a hub id; replaces model.name. Only its config.json "
            "is read.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The adapter, one of `moelora presets`; replaces adapter.preset. Without a "
            "recipe: moe_lora.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Sequences at once; replaces training.per_device_train_batch_size. Default: 8.",
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Tokens in a sequence; replaces data.max_length. Default: 256."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of the base's weights: float32, bfloat16, float16 or auto, what training takes "
            "on this machine; replaces model.dtype.",
        ),
    ] = None,
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Compute activations again in the backward; sets training.gradient_checkpointing.",
        ),
    ] = False,
    trust: Trust = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Show parameters, memory and cost of an adapter, beside LoRA's, before anything is trained."""
    from moelora_plugin.training.planning import plan as run

    words = arguments or []
    recipe = Path(words[0]) if words and "=" not in words[0] else None
    options = {
        "model.name": model,
        "adapter.preset": preset,
        "training.per_device_train_batch_size": batch_size,
        "data.max_length": length,
        "model.dtype": dtype,
        "training.gradient_checkpointing": checkpointing or None,
    }
    given = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    with Console(stderr=True).status("Going through a training step..."):
        result = run(recipe, [*words[recipe is not None :], *given])
    if as_json:
        display_block(json.dumps(result.to_dict(), indent=2))
    else:
        display(result.table())
