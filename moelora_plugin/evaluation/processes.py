"""The processes that share an evaluation: `accelerate launch` or `torchrun` starts them."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..base_model import default_device
from ..errors import ConfigError

T = TypeVar("T")

# One process may wait for another as long as that has rows left.
_TIMEOUT = timedelta(weeks=52)


def launched(device: str | None) -> PartialState | None:
    """This process among those that were launched together; None where it is alone.

    Args:
        device: the device asked for: "cpu", or None for an accelerator where there is one.

    Raises:
        ConfigError: `device` names one accelerator for all processes.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return None
    if device not in (None, "cpu"):
        raise ConfigError(
            f"--device {device} is one device for {count} processes, of which each has its own; "
            "leave --device out, or pass --device cpu."
        )
    return PartialState(cpu=(device or default_device()) == "cpu", timeout=_TIMEOUT)


def of_first(value: T, processes: PartialState | None) -> T:
    """The value that the first of the processes has."""
    if processes is None:
        return value
    values = [value]
    broadcast_object_list(values)
    return values[0]
