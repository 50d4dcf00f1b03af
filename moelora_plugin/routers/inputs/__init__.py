"""Router inputs: what a decision is about. One file each, one line in `INPUTS`."""

from __future__ import annotations

from .base import RouterInput
from .token import TokenInput

INPUTS: dict[str, type[RouterInput]] = {
    "token": TokenInput,
}

__all__ = ["INPUTS", "RouterInput", "TokenInput"]
