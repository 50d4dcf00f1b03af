"""What the adapted layers of one model know about the call they are part of.

A linear in the middle of a network sees its own input only. Which tokens are padding, which belong
to the prompt, where one packed document ends, whether a cache holds the past and which task a
sequence belongs to are read from the arguments of the model's call, by hooks on the model and on
the parts of it that see tokens of their own (an encoder, a decoder, a tower of images or sound).
"""

from __future__ import annotations

from .context import ROUTING_IDS, CallContext, contexts_of, routing_ids
from .generation import Generation
from .reading import read_call
from .view import Call

__all__ = [
    "ROUTING_IDS",
    "Call",
    "CallContext",
    "Generation",
    "contexts_of",
    "read_call",
    "routing_ids",
]
