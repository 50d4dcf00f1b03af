"""From numbers to a LayerPlan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..types import LayerPlan
from ..values import MAX_EXPERTS, MAX_RANK, shown

if TYPE_CHECKING:
    from ..config import MoeLoraConfig

# What an allocation decides, and the key of the configuration that holds where it does not.
AXES: Mapping[str, str] = {
    "num_experts": "num_experts",
    "top_k": "top_k",
    "r": "r",
    "alpha": "lora_alpha",
}


def plan_of(
    config: MoeLoraConfig,
    num_experts: int,
    top_k: int,
    r: int | Sequence[int],
    alpha: float,
) -> LayerPlan:
    """The plan of one module.

    Args:
        config: says with `total_rank` whether a single `r` is one expert's or is split over them,
            and whether alpha / r takes the mean of several or their sum.
        num_experts: experts.
        top_k: experts selected for a token.
        r: rank of each expert, one for all or one per expert.
        alpha: LoRA alpha.

    Raises:
        ConfigError: the rank cannot be split evenly, top_k is more than num_experts, or the experts
            are more than any model holds.
    """
    _require_size(num_experts, r, split=config.total_rank)
    if top_k > num_experts:
        raise ConfigError(
            f"top_k={top_k} is more than num_experts={num_experts}; lower top_k or raise "
            "num_experts."
        )
    if not isinstance(r, int):
        if len(r) != num_experts:
            raise ConfigError(
                f"r={list(r)!r} must hold one rank for each of {num_experts} experts."
            )
        total = sum(r) if config.total_rank else None
        return LayerPlan(num_experts, top_k, tuple(r), alpha, scale_rank=total)
    if not config.total_rank:
        return LayerPlan(num_experts, top_k, (r,) * num_experts, alpha)
    if r % num_experts:
        raise ConfigError(
            f"r={r} cannot be split evenly over num_experts={num_experts}; make r a multiple of it "
            "or set total_rank to False."
        )
    return LayerPlan(num_experts, top_k, (r // num_experts,) * num_experts, alpha, scale_rank=r)


def plan_from(
    config: MoeLoraConfig, where: str, values: Mapping[str, Any], ranks: str = "r"
) -> LayerPlan:
    """The plan of one module, from an allocation's values and the configuration's for the rest.

    Args:
        config: the adapter's.
        where: what holds the values, for errors ("allocation_kwargs").
        values: by the names in `AXES`; `r` may be a list, one rank per expert.
        ranks: what `r` is called there.

    Raises:
        ConfigError: a value is not of its kind, or they do not fit together.
    """
    require_values(where, values, ranks)
    full = {axis: values.get(axis, getattr(config, key)) for axis, key in AXES.items()}
    return plan_of(config, **full)


def require_values(where: str, values: Mapping[str, Any], ranks: str = "r") -> None:
    """Refuse values that are not of their axis' kind.

    Args:
        where: what holds the values, for errors ("allocation_kwargs").
        values: by the names in `AXES`.
        ranks: what `r` is called there.

    Raises:
        ConfigError: with the key to change.
    """
    for axis, value in values.items():
        if axis == "alpha":
            good = isinstance(value, int | float) and 0 < value < math.inf
            what = "a positive number"
        elif axis == "r" and isinstance(value, list | tuple):
            good = bool(value) and all(_is_count(rank) for rank in value)
            what = "integers of at least 1"
        else:
            good, what = _is_count(value), "an integer of at least 1"
        if isinstance(value, bool) or not good:
            key = ranks if axis == "r" else axis
            raise ConfigError(f"{where}[{key!r}]={shown(value)} must be {what}.")


def _require_size(num_experts: int, r: int | Sequence[int], *, split: bool) -> None:
    """Before anything of that size is made."""
    if num_experts > MAX_EXPERTS:
        raise ConfigError(f"num_experts={num_experts} must not be more than {MAX_EXPERTS:,}.")
    total = r * (1 if split else num_experts) if isinstance(r, int) else sum(r)
    if total > MAX_RANK:
        raise ConfigError(
            f"The experts of a module have the rank {total} together, more than {MAX_RANK:,}; "
            "lower r or num_experts."
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
