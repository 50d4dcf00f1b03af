"""Gates that a linear does not decide about itself.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..call import Call
from ..errors import ConfigError, ExportError
from ..per_thread import PerThread, nothing
from ..types import Routing

if TYPE_CHECKING:
    from .folding import FoldingLinear
    from .linear import MoeLoraLinear
    from .routed import RoutedLayer


class GateSource(ABC):
    """Gates of a linear that come from elsewhere: from its block, its layer or the model.

    Attributes:
        experts_per_row: as a router's; see there.
    """

    experts_per_row: ClassVar[float | None] = None

    @abstractmethod
    def gates(self, linear: MoeLoraLinear, adapter: str, x: Tensor) -> Tensor:
        """The gates (T, E) of this linear's experts for x (..., in)."""

    def routing(self, linear: MoeLoraLinear, adapter: str) -> Routing | None:
        """The decision of the same pass where its auxiliary losses enter at this linear."""
        return None

    def base_output(self, linear: MoeLoraLinear, x: Tensor) -> Tensor | None:
        """The base's output for x where it can be had for less; None where x has to go through."""
        return None

    def forget(self, linear: MoeLoraLinear, adapter: str) -> None:  # noqa: B027
        """The linear has lost the adapter: so does what decides for it."""

    def fixed_weights(self, linear: FoldingLinear, adapter: str) -> Tensor | None:
        """The gates (E,) where they ignore the input; else None."""
        return None

    def mean_weights(
        self, linear: FoldingLinear, adapter: str, mean_of: Callable[[RoutedLayer], Tensor]
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

    def fixed_weights(self, linear: FoldingLinear, adapter: str) -> Tensor | None:
        """One."""
        return torch.ones(1)

    def mean_weights(
        self, linear: FoldingLinear, adapter: str, mean_of: Callable[[RoutedLayer], Tensor]
    ) -> Tensor:
        """One."""
        return torch.ones(1)


class Decision:
    """What the router of one linear has decided in the pass that is going on, for others to follow.

    Attributes:
        owner: the linear with the router.
        name: its name, for messages.
        site: the site's, for messages.
        option: the key that says which linear decides, for messages.
    """

    def __init__(self, owner: MoeLoraLinear, name: str, site: str, option: str) -> None:
        self.owner = owner
        self.name = name
        self.site = site
        self.option = option
        # The last decision with its graph, and the model's call that it belongs to. What a thread
        # has forwarded may be recomputed in another.
        self._of_thread: PerThread[tuple[Routing, Call] | None] = PerThread(nothing)
        self._last: tuple[Routing, Call] | None = None

    def __getstate__(self) -> dict[str, object]:
        # A copy of the model is in no pass, and what has a graph cannot be copied.
        return {**self.__dict__, "_last": None}

    def take(self, routing: Routing, call: Call) -> None:
        """Note what the owner has decided."""
        self._last = (routing, call)
        self._of_thread.set(self._last)

    @property
    def routing(self) -> Routing | None:
        """What the owner has decided in the call that is going on, with its graph."""
        call = self.owner.shared.call.call
        for noted in (self._of_thread.get(), self._last):
            # A layer that is called by itself has no call to go by.
            if noted is not None and (noted[1] is call or call.shape is None):
                return noted[0]
        return None

    def weights(self, x: Tensor) -> Tensor:
        """The owner's gates (T, E), for a linear that reads x (..., in).

        Raises:
            ConfigError: the owner has not run in this pass, or saw other tokens.
        """
        routing = self.routing
        if routing is None:
            raise ConfigError(
                f"A target module of site {self.site!r} ran before {self.name}, which decides for "
                f"it; name the one that runs first by {self.option}."
            )
        tokens = x.numel() // max(x.shape[-1], 1)
        weights_TE = routing.weights
        if len(weights_TE) != tokens:
            raise ConfigError(
                f"A target module of site {self.site!r} got {tokens} tokens, but {self.name}, "
                f"which decides for it, {len(weights_TE)}; leave it out by exclude_modules."
            )
        return weights_TE
