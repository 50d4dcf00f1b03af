"""What a preset is, and how explicit values go on top of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import ConfigError

# exact:     the gates are the same for every input; `merge_and_unload` gives a plain model.
# per task:  they are the same for every input of a task; merge inside `routing_ids(model, ...)`.
# mean-gate: they follow the input; only `moelora export --strategy mean-gate`, an approximation.
# no:        the update is no matrix even for fixed gates.
Merge = Literal["exact", "per task", "mean-gate", "no"]

# Each part's name is a key, and its options stand under another: a part that is replaced takes the
# preset's options for the old one with it.
_OPTIONS_OF = {
    f"{part}_kwargs": part
    for part in ("site", "router", "router_score", "router_input", "expert", "allocation", "init")
}
# These map names of parts to what they take; in options, None is a value like any other.
_NAMED = ("router_modifiers", "aux_losses")


@dataclass(frozen=True)
class Preset:
    """One method: which part it takes on each axis, and what is known about it.

    Attributes:
        summary: one line for `moelora presets`.
        source: authors, year and arXiv id of the paper.
        overrides: fields of MoeLoraConfig.
        title: the paper's.
        numbers: where the numbers come from: the paper, its authors' code, or our choice.
        merge: whether the trained adapter can be folded into the base's weights.
        needs: what only the user can give, by key ("init_kwargs.paths"), and what to give there.
        omits: what of the paper the preset does not cover, and where it differs.
        verified: how the preset was checked beyond the tests that every preset runs through.
        optimizer: learning rates and the like, where the paper or its code says them.
        usage: what the data or the calls must bring along.
    """

    summary: str
    source: str
    overrides: Mapping[str, Any]
    title: str = ""
    numbers: str = ""
    merge: Merge = "mean-gate"
    needs: Mapping[str, str] = field(default_factory=dict)
    omits: tuple[str, ...] = ()
    verified: tuple[str, ...] = ()
    optimizer: str = ""
    usage: str = ""

    def with_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The preset's fields with explicit values on top.

        A mapping (options, modifiers, auxiliary losses) is joined key by key, the explicit value
        winning; None takes a modifier or a loss out. Where a part is replaced by another, the
        preset's options for the old one go with it.
        """
        fields = dict(self.overrides)
        for options, part in _OPTIONS_OF.items():
            if part in values and values[part] != fields.get(part):
                fields.pop(options, None)
        for key, value in values.items():
            preset_value = fields.get(key)
            if isinstance(preset_value, Mapping) and isinstance(value, Mapping):
                fields[key] = {**preset_value, **value}
            else:
                fields[key] = value
            if key in _NAMED and isinstance(fields[key], Mapping):
                fields[key] = {k: v for k, v in fields[key].items() if v is not None}
        return fields

    def missing(self, fields: Mapping[str, Any]) -> Iterator[str]:
        """The keys of `needs` that `fields` leaves out."""
        for key in self.needs:
            value: Any = fields
            for part in key.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if value is None:
                yield key


def resolve(name: str, preset: Preset, values: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's fields with explicit values on top, complete.

    Args:
        name: the preset's.
        preset: the preset.
        values: explicit values, which win.

    Raises:
        ConfigError: what only the user can give is missing; the message names the key.
    """
    fields = preset.with_values(values)
    for key in preset.missing(fields):
        raise ConfigError(f"Preset {name!r} needs {key}: {preset.needs[key]}.")
    return fields
