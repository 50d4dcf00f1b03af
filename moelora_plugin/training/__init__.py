"""Recipes and the embedded trainer.

`load_recipe` and `Recipe` are light; `train` loads torch and transformers on first use (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from .result import TrainResult
    from .run import train

__all__ = ["Recipe", "TrainResult", "load_recipe", "train"]


def __getattr__(name: str) -> Any:
    if name == "TrainResult":
        from .result import TrainResult

        return TrainResult
    if name == "train":
        from .run import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
