"""Names of layers as people read them."""

from __future__ import annotations


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key under which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def short_name(name: str) -> str:
    """The name in the base model, without what PEFT puts before it."""
    return name.removeprefix("base_model.model.")
