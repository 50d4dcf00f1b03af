"""The Typer application: its commands, `--version`, and how errors leave it."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moelora_plugin.errors import MoeLoraError

from . import (
    cluster,
    compare,
    data,
    demo,
    doctor,
    evaluate,
    export,
    init,
    inspect_,
    launch,
    path,
    plan,
    presets,
    report,
    search,
    tasks,
    train,
)
from .display import display, display_error


class _Group(TyperGroup):
    """The commands; an error that a user can mend becomes one line and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except MoeLoraError as error:
            if ctx.params["debug"]:
                raise
            display_error(error)
            raise typer.Exit(1) from None


# A traceback that does appear is a bug: Python's plain one is the one to copy into a report.
app = typer.Typer(
    name="moelora",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _name, _function, _epilog in (
    ("plan", plan.plan, plan.EXAMPLES),
    ("train", train.train, train.EXAMPLES),
    ("eval", evaluate.evaluate, evaluate.EXAMPLES),
    ("compare", compare.compare, compare.EXAMPLES),
    ("report", report.report, report.EXAMPLES),
    ("export", export.export, export.EXAMPLES),
    ("demo", demo.demo, demo.EXAMPLES),
    ("cluster", cluster.cluster, cluster.EXAMPLES),
    ("init", init.init, init.EXAMPLES),
    ("tasks", tasks.tasks, tasks.EXAMPLES),
    ("presets", presets.presets, presets.EXAMPLES),
    ("inspect", inspect_.inspect, inspect_.EXAMPLES),
    ("path", path.path, path.EXAMPLES),
    ("doctor", doctor.doctor, doctor.EXAMPLES),
):
    app.command(_name, epilog=_epilog)(_function)
app.add_typer(search.app, name="search")
app.add_typer(data.app, name="data", epilog=data.EXAMPLES)
app.command("launch", epilog=launch.EXAMPLES, context_settings=launch.CONTEXT)(launch.launch)


def _show_version(wanted: bool) -> None:
    if wanted:
        from moelora_plugin import __version__

        display(f"moelora {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the traceback of an error; works anywhere on the line."),
    ] = False,
) -> None:
    """Train, evaluate and share mixture-of-LoRA-experts adapters."""


def main() -> None:
    """Run the command line."""
    # PEFT asks newer models of transformers by an old name: nothing that a user could mend.
    warnings.filterwarnings(
        "ignore", ".is_gradient_checkpointing. is deprecated", category=FutureWarning
    )
    arguments = sys.argv[1:]
    # People add --debug at the end of a line that failed; it is an option of the whole program,
    # unless the line's end is another program's.
    if next((word for word in arguments if not word.startswith("-")), None) != "launch":
        arguments.sort(key=lambda word: word != "--debug")
    app(args=arguments)
