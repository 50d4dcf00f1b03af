"""Names of layers as people read them."""

from __future__ import annotations


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key under which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def short_name(name: str) -> str:
    """The name in the base model, without what PEFT puts before it."""
    return name.removeprefix("base_model.model.")


def layer_label(name: str) -> str:
    """The layer's index in a dotted name, or all of the name but the module where it has none."""
    parts = name.split(".")
    return next((part for part in parts if part.isdigit()), ".".join(parts[:-1]))
