"""`moelora presets`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD

from moelora_plugin.tables import PlainTable, plain_grid, shown

from .display import display, display_block
from .options import examples

if TYPE_CHECKING:
    from moelora_plugin.presets import Preset

EXAMPLES = examples("moelora presets", "moelora presets gr_moe_lora", "moelora presets mola --json")

_MERGES = {
    "exact": "exactly, like one LoRA",
    "per task": "exactly for one task or cluster, inside routing_ids(model, ...)",
    "mean-gate": "as an approximation only (`moelora export --strategy mean-gate`)",
    "no": "not at all",
}


def presets(
    name: Annotated[
        str | None, typer.Argument(help="Show what this preset sets. Default: list them all.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """List the named adapter configurations (`adapter.preset` in a recipe)."""
    from moelora_plugin.lookup import given
    from moelora_plugin.presets import PRESETS

    if name is None:
        if as_json:
            display_block(_list_as_json(PRESETS))
        else:
            display(_list(PRESETS))
        return
    preset = given("presets", name, PRESETS)
    if as_json:
        display_block(json.dumps({**_about(name, preset), **_resolved(preset)}, indent=2))
        return
    display(
        _facts(name, preset),
        _config(preset),
        *_paragraph("Not covered, or different from the paper:", preset.omits),
        *_paragraph("How it was checked, beyond the tests of every preset:", preset.verified),
        "In a recipe (`moelora train recipe.yaml`):",
    )
    display_block(_recipe(name, preset))


def _list(presets: dict[str, Preset]) -> PlainTable:
    table = PlainTable(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("preset", no_wrap=True)
    table.add_column("what it is")
    table.add_column("arXiv", no_wrap=True)
    for name, preset in presets.items():
        table.add_row(name, preset.summary, preset.source.rpartition("arXiv ")[2])
    return table


def _list_as_json(presets: dict[str, Preset]) -> str:
    return json.dumps([_about(name, preset) for name, preset in presets.items()], indent=2)


def _about(name: str, preset: Preset) -> dict[str, Any]:
    return {
        "name": name,
        "summary": preset.summary,
        "title": preset.title,
        "source": preset.source,
        "numbers": preset.numbers,
        "merge": preset.merge,
        "needs": dict(preset.needs),
        "usage": preset.usage,
        "optimizer": preset.optimizer,
        "omits": list(preset.omits),
        "verified": list(preset.verified),
    }


def _resolved(preset: Preset) -> dict[str, Any]:
    """Every field of the adapter, and which of them the preset sets; what it needs is None."""
    from dataclasses import fields

    from peft.config import PeftConfig

    from moelora_plugin.config import MoeLoraConfig

    inherited = {field.name for field in fields(PeftConfig)}
    default = vars(MoeLoraConfig())
    names = [f.name for f in fields(MoeLoraConfig) if f.name not in (*inherited, "format_version")]
    config = {name: preset.overrides.get(name, default[name]) for name in names}
    for key in preset.needs:
        field, _, option = key.partition(".")
        if option:
            config[field] = {**config[field], option: None}
    return {"config": config, "set_by_the_preset": sorted(preset.overrides)}


def _facts(name: str, preset: Preset) -> PlainTable:
    facts = {
        name: preset.summary,
        "Paper": preset.title,
        "Source": preset.source,
        "Numbers": preset.numbers,
        "Optimizer": preset.optimizer,
        "Merges": _MERGES[preset.merge],
        **{f"Needs {key}": what for key, what in preset.needs.items()},
        "Calls": preset.usage,
    }
    table = plain_grid((0, 2))
    for label, text in facts.items():
        if text:
            table.add_row(shown(label, "bold"), text)
    return table


def _config(preset: Preset) -> PlainTable:
    resolved = _resolved(preset)
    table = PlainTable(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("field")
    table.add_column("value", overflow="fold")
    table.add_column("from")
    for key, value in resolved["config"].items():
        ours = key in preset.overrides
        table.add_row(
            shown(key, "bold" if ours else ""),
            str(value),
            "preset" if ours else "default",
        )
    return table


def _paragraph(title: str, sentences: Iterable[str]) -> list[str | PlainTable]:
    sentences = list(sentences)
    if not sentences:
        return []
    table = plain_grid((0, 1))
    for sentence in sentences:
        table.add_row("-", sentence)
    return [title, table]


def _recipe(name: str, preset: Preset) -> str:
    """What to write into a recipe, with a place for each value that is needed."""
    lines = ["adapter:", f"  preset: {name}"]
    if not {"target_modules"} & {*preset.overrides, *preset.needs}:
        lines.append("  target_modules: [q_proj, k_proj, v_proj, o_proj]")
    options: dict[str, list[str]] = {}
    for key in preset.needs:
        field, _, option = key.partition(".")
        options.setdefault(field, []).extend([option] if option else [])
    for field, names in options.items():
        inside = ", ".join(f"{option}: ..." for option in names)
        lines.append(f"  {field}: {{{inside}}}" if inside else f"  {field}: ...")
    if "gate_rescale" not in preset.overrides:
        lines.append("  gate_rescale: sqrt  # or none, exact: any of them goes with any preset")
    return "\n".join([*lines, "optimizer: {name: gradamw}  # or radamw, grsgd, rsgd"])
