"""An optimizer's state that another run has written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError

# Rates and decay are the schedule's, which goes on as every torch optimizer's does.
_COMPARED = (
    "order",
    "damping",
    "scale_compensation",
    "lora_plus_ratio",
    "bias_correction",
    "max_grad_norm",
    "betas",
    "eps",
    "momentum",
)
_KEYS = {"max_grad_norm": "gate_max_grad_norm"}


def refuse_other_options(
    ours: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> None:
    """What the run asks for must be what the state was made with; torch takes the state's silently.

    Args:
        ours: the optimizer's groups.
        saved: those of the state.

    Raises:
        ConfigError: an option differs, or it is another optimizer's state.
    """
    for group, found in zip(ours, saved, strict=False):  # torch refuses other numbers of groups
        for key in _COMPARED:
            if (key in group) != (key in found):
                raise ConfigError(
                    "The optimizer's state is that of another optimizer than this run names: "
                    f"{key} is an option of one of the two only; set the optimizer back, or start "
                    "anew without resuming."
                )
            if key in group and _plain(group[key]) != _plain(found[key]):
                raise ConfigError(
                    f"{_KEYS.get(key, key)} is {group[key]!r} in this run, and the optimizer's "
                    f"state was made with {found[key]!r}; set it back, or start anew without "
                    "resuming."
                )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
