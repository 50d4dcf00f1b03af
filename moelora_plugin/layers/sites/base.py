"""What every site is: where in the model a routing decision is taken, and about what."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...config import MoeLoraConfig
from ...types import LayerPlan, Place
from ..routed import Shared


class Site(ABC):
    """Distributes experts and routers over the target modules of one adapter.

    Options are keyword-only parameters of the constructor and stand under `site_kwargs`. One object
    serves the injection of one adapter.

    Args:
        config: the adapter's.
        targets: the target modules, in the model's order.
    """

    def __init__(self, config: MoeLoraConfig, targets: Sequence[Place]) -> None:
        self.config = config
        self.targets = tuple(targets)

    @classmethod  # noqa: B027 - most options are settled by their types
    def check(cls, config: MoeLoraConfig, **options: Any) -> None:
        """Refuse what no base could make good, when a configuration is made.

        Args:
            config: the adapter's.
            **options: those of the site that are given.

        Raises:
            ConfigError: with the key to change.
        """

    @abstractmethod
    def expert_plan(self, place: Place, plan: LayerPlan) -> LayerPlan:
        """The experts of a target module, given what the allocation says."""

    @abstractmethod
    def router_plan(self, place: Place, plan: LayerPlan) -> LayerPlan | None:
        """What the router of a target module decides about; None where it has none."""

    def connect(self, model: nn.Module, adapter: str, shared: Shared) -> None:  # noqa: B027
        """After injection: add what target modules share, say where their gates come from."""
