"""What every router is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from ..types import LayerPlan, Routing


class Router(nn.Module, ABC):
    """A module x -> Routing for one target module.

    Its parameters are direct attributes (no submodules): PEFT strips the adapter's name from a
    state-dict key only where it is the last or the last but one part
    (`moelora_router.<adapter>.<parameter>`).

    Args:
        in_features: I.
        plan: the layer's experts.
    """

    def __init__(self, in_features: int, plan: LayerPlan) -> None:
        super().__init__()
        self.in_features = in_features
        self.plan = plan

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the parameters afresh."""

    @abstractmethod
    def forward(self, x_TI: Tensor) -> Routing:
        """Route T tokens, x (T, I)."""

    @abstractmethod
    def static_weights(self) -> Tensor | None:
        """The gates (E,) where they ignore the input, so that a merge is exact; else None."""
