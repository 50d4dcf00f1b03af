"""`moelora launch`."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import examples

EXAMPLES = examples(
    "moelora launch llamafactory-cli train config.yaml",
    "MOELORA_AUTOLOAD=0 moelora launch torchrun --nproc-per-node 2 train.py",
)

# Options after COMMAND are its own.
CONTEXT = {"allow_interspersed_args": False}


def launch(
    command: Annotated[
        list[str],
        typer.Argument(metavar="COMMAND", help="The command, followed by all that belongs to it."),
    ],
) -> None:
    """Run a command with the adapter and the optimizers known to it and to its workers.

    Needed only where `import torch` does not activate moelora: with
    MOELORA_AUTOLOAD=0 or TORCH_DEVICE_BACKEND_AUTOLOAD=0, or where moelora
    is not installed in the environment that has COMMAND.
    """
    from moelora_plugin.launch import launch as run

    run(command)
