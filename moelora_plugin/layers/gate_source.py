"""Gates that a linear does not decide about itself.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ExportError
from ..types import Routing

if TYPE_CHECKING:
    from .linear import MoeLoraLinear
    from .routed import RoutedLayer


class GateSource(ABC):
    """Gates of a linear that come from elsewhere: from its block, its layer or the model."""

    @abstractmethod
    def gates(self, linear: MoeLoraLinear, adapter: str, x: Tensor) -> Tensor:
        """The gates (T, E) of this linear's experts for x (..., in)."""

    def routing(self, linear: MoeLoraLinear, adapter: str) -> Routing | None:
        """The decision of the same pass where its auxiliary losses enter at this linear."""
        return None

    def base_output(self, linear: MoeLoraLinear, x: Tensor) -> Tensor | None:
        """The base's output for x where it can be had for less; None where x has to go through."""
        return None

    def fixed_weights(self, linear: MoeLoraLinear, adapter: str) -> Tensor | None:
        """The gates (E,) where they ignore the input; else None."""
        return None

    def mean_weights(
        self, linear: MoeLoraLinear, adapter: str, mean_of: Callable[[RoutedLayer], Tensor]
    ) -> Tensor:
        """The gates (E,) of an approximate merge.

        Args:
            linear: whose experts.
            adapter: its adapter.
            mean_of: gives the mean gates of a layer with a router.

        Raises:
            ExportError: these experts cannot be folded into one linear.
        """
        raise ExportError(
            f"{type(self).__name__} gives no mean gates, so there is no mean-gate merge; serve the "
            "adapter unmerged."
        )


class AlwaysOn(GateSource):
    """Gate 1 for the one expert of a linear: plain LoRA, without a router."""

    def gates(self, linear: MoeLoraLinear, adapter: str, x: Tensor) -> Tensor:
        """Ones."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return x.new_ones(x.numel() // x.shape[-1], 1, dtype=dtype)

    def fixed_weights(self, linear: MoeLoraLinear, adapter: str) -> Tensor | None:
        """One."""
        return torch.ones(1)

    def mean_weights(
        self, linear: MoeLoraLinear, adapter: str, mean_of: Callable[[RoutedLayer], Tensor]
    ) -> Tensor:
        """One."""
        return torch.ones(1)
