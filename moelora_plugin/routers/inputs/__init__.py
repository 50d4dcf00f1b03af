"""Router inputs: what a decision is about. One line each in `INPUTS`."""

from __future__ import annotations

from .base import RouterInput
from .ids import ClusterInput, TaskInput
from .none import NoInput
from .prompt import PromptInput
from .sequence import SequenceInput
from .token import TokenInput

INPUTS: dict[str, type[RouterInput]] = {
    "token": TokenInput,
    "sequence": SequenceInput,
    "prompt": PromptInput,
    "task": TaskInput,
    "cluster": ClusterInput,
    "none": NoInput,
}

__all__ = ["INPUTS", "RouterInput", "TokenInput"]
