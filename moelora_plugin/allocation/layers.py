"""Numbers that change with the depth of the layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..lookup import unknown_name_message
from ..types import LayerPlan, Place
from ..values import MAX_LAYERS
from .base import AXES, plan_from

if TYPE_CHECKING:
    from ..config import MoeLoraConfig

# MoLA's distributions of experts over four groups of layers, bottom to top, as multiples of the
# mean (arXiv 2402.08562: with a mean of 5 these are 8-6-4-2, 2-4-6-8, 8-2-2-8 and 5-5-5-5).
SHAPES: dict[str, tuple[float, ...]] = {
    "triangle": (1.6, 1.2, 0.8, 0.4),
    "inverted_triangle": (0.4, 0.8, 1.2, 1.6),
    "hourglass": (1.6, 0.4, 0.4, 1.6),
    "rectangle": (1.0, 1.0, 1.0, 1.0),
}


def layers(
    config: MoeLoraConfig,
    place: Place,
    *,
    num_experts: int | str | Sequence[int] | None = None,
    top_k: int | str | Sequence[int] | None = None,
    r: int | str | Sequence[int | Sequence[int]] | None = None,
    alpha: float | str | Sequence[float] | None = None,
) -> LayerPlan:
    """Each number for all layers, or a list of them from the bottom to the top.

    A list of m numbers is spread over L layers in groups of neighbours: layer i takes entry
    floor(i m / L). So 2-4-6-8 over 32 layers gives each number to 8 layers, and over 30 layers to
    8, 7, 8 and 7. Modules that are in no layer (lm_head) keep the configuration's numbers.

    The allocations of MoLA (numbers of experts, arXiv 2402.08562) and HILO (numbers and ranks) are
    instances.

    Args:
        config: gives the numbers that are left out.
        place: the module.
        num_experts: an integer, a list, a string like "2-4-6-8", or a shape: "triangle" (more
            experts below), "inverted_triangle" (more above), "hourglass" or "rectangle". A shape
            spreads four numbers whose mean is the configuration's num_experts: the total is that
            of the configuration where the number of layers divides by four.
        top_k: an integer, a list or a string.
        r: likewise; an entry of a list may itself be a list, one rank per expert.
        alpha: likewise.

    Raises:
        ConfigError: a list is empty or longer than there are layers, or a value is not of its kind.
    """
    given = {"num_experts": num_experts, "top_k": top_k, "r": r, "alpha": alpha}
    values: dict[str, Any] = {}
    for axis, option in given.items():
        if option is None:
            continue
        entries = _entries(axis, option, config.num_experts)
        if place.layer is None:
            continue
        if len(entries) > place.num_layers:
            raise ConfigError(
                f"allocation_kwargs[{axis!r}]={option!r} has {len(entries)} entries for "
                f"{place.num_layers} layers; give at most one per layer."
            )
        values[axis] = entries[place.layer * len(entries) // place.num_layers]
    return plan_from(config, "allocation_kwargs", values)


def check_layers(config: MoeLoraConfig) -> list[LayerPlan]:
    """Without a base: the plans, if there are as many layers as the longest list has entries.

    Raises:
        ConfigError: they do not.
    """
    options = config.allocation_kwargs
    lengths = [
        len(_entries(axis, options[axis], config.num_experts))
        for axis in AXES
        if options.get(axis) is not None
    ]
    longest = max(lengths, default=0)
    if longest > MAX_LAYERS:
        raise ConfigError(
            f"allocation_kwargs has a list of {longest} entries; no model has more than "
            f"{MAX_LAYERS:,} layers."
        )
    plans = [layers(config, Place("", layer, longest), **options) for layer in range(longest)]
    return list(dict.fromkeys(plans))


def _entries(axis: str, option: Any, mean: int) -> Sequence[Any]:
    """The option as a list from the bottom to the top."""
    if isinstance(option, str):
        if re.fullmatch(r"\d+(-\d+)*", option):
            return [int(part) for part in option.split("-")]
        if axis == "num_experts":
            if option not in SHAPES:
                raise ConfigError(unknown_name_message("shape of num_experts", option, SHAPES))
            return _shaped(SHAPES[option], mean)
        raise ConfigError(
            f"allocation_kwargs[{axis!r}]={option!r} must be a number, a list or a string like "
            "'2-4-6-8'."
        )
    if not isinstance(option, list | tuple):
        return [option]
    if not option:
        raise ConfigError(f"allocation_kwargs[{axis!r}] must not be an empty list.")
    return option


def _shaped(shape: Sequence[float], mean: int) -> list[int]:
    """Integers in the shape's proportions whose mean is exactly `mean` (largest remainders)."""
    exact = [share * mean for share in shape]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(shape)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: mean * len(shape) - sum(counts)]:
        counts[i] += 1
    if min(counts) < 1:
        raise ConfigError(
            f"num_experts={mean} is too few for this shape in allocation_kwargs['num_experts'], "
            "some layers would have none; raise num_experts."
        )
    return counts
