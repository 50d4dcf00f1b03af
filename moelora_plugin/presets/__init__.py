"""Named adapter configurations: one entry per method of the field.

Presets of a family share a file; adding one is one entry. An explicit value passed beside the
preset wins. Nothing heavy is imported here.
"""

from __future__ import annotations

from .base import Merge, Preset, resolve
from .blocks import BLOCKS
from .ids import IDS
from .paper import PAPER
from .pretrained import PRETRAINED
from .ranks import RANKS
from .tokens import TOKENS

PRESETS: dict[str, Preset] = {**PAPER, **TOKENS, **BLOCKS, **IDS, **RANKS, **PRETRAINED}

__all__ = ["PRESETS", "Merge", "Preset", "resolve"]
