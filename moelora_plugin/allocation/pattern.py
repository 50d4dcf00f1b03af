"""Numbers by the module's name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..patterns import require_pattern, whole_name
from ..types import LayerPlan, Place
from .base import plan_from, require_values

if TYPE_CHECKING:
    from ..config import MoeLoraConfig


def pattern(
    config: MoeLoraConfig,
    place: Place,
    *,
    num_experts: Mapping[str, int] | None = None,
    top_k: Mapping[str, int] | None = None,
    r: Mapping[str, int | Sequence[int]] | None = None,
    alpha: Mapping[str, float] | None = None,
) -> LayerPlan:
    """For each number a mapping from pattern to value; the first pattern that matches wins.

    A pattern is a regular expression for the whole name of the module or for its last parts, as in
    PEFT's `rank_pattern`: "q_proj", or "layers[.](0|1)[.].*". A module that none matches takes the
    configuration's number.

    Args:
        config: gives the numbers that no pattern matches.
        place: the module.
        num_experts: experts by pattern.
        top_k: selected experts by pattern.
        r: rank by pattern; a list holds one rank per expert.
        alpha: alpha by pattern.

    Raises:
        ConfigError: no mapping, a pattern that is no regular expression, or a value that is not of
            its kind.
    """
    given = {"num_experts": num_experts, "top_k": top_k, "r": r, "alpha": alpha}
    values: dict[str, Any] = {}
    for axis, mapping in given.items():
        if mapping is None:
            continue
        if not isinstance(mapping, Mapping):
            raise ConfigError(
                f"allocation_kwargs[{axis!r}]={mapping!r} must map patterns to values."
            )
        matching = (value for key, value in mapping.items() if _matches(axis, key, place.name))
        found = next(matching, None)
        if found is not None:
            values[axis] = found
    return plan_from(config, "allocation_kwargs", values)


def check_pattern(config: MoeLoraConfig) -> list[LayerPlan]:
    """Without a base: patterns have to be such, and the values of their kinds; no plan is known.

    Raises:
        ConfigError: one is not.
    """
    for axis, mapping in config.allocation_kwargs.items():
        for expression, value in (mapping or {}).items():
            require_pattern(f"allocation_kwargs[{axis!r}]", expression, whole_name(expression))
            require_values(f"allocation_kwargs[{axis!r}][{expression!r}]", {axis: value})
    return []


def _matches(axis: str, expression: str, name: str) -> bool:
    require_pattern(f"allocation_kwargs[{axis!r}]", expression, whole_name(expression))
    return re.fullmatch(whole_name(expression), name) is not None
