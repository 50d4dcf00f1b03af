"""A router per decoder layer, whose experts are the layer's target modules.

Shape suffixes: T tokens, E target modules of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ...config import MoeLoraConfig
from ...errors import ConfigError
from ...patterns import require_pattern
from ...types import LayerPlan, Place, Routing
from ..folding import FoldingLinear
from ..gate_source import AlwaysOn, Decision, GateSource
from ..linear import MoeLoraLinear
from ..routed import RoutedLayer, Shared
from .base import Site
from .block import single_expert


class LayerSite(Site):
    """MiLoRA (Zhang et al., arXiv 2410.18035): each LoRA of a decoder layer is an expert.

    The target modules of a layer have one LoRA each, and one of them, the owner, a router over all
    of them: column i of its decision is the gate of the i-th. `top_k` counts modules; `num_experts`
    is not read, since a layer has as many experts as target modules. With router_input "prompt" the
    decision is taken once, at the prefill, and serves all tokens that follow; any other input works
    as well. Target modules outside of every layer get a plain LoRA, always on.

    The router reads the owner's input. The paper's pools the layer's own input, which for the
    first projection of the attention differs by the norm in between.

    Args:
        config: the adapter's.
        targets: the target modules.
        owner: regular expression for the last part of the owner's name; the first target module of
            each layer where left out. It has to run before the others.

    Raises:
        ConfigError: no target module is in a layer, or none of a layer is called like `owner`.
    """

    def __init__(
        self, config: MoeLoraConfig, targets: Sequence[Place], *, owner: str | None = None
    ) -> None:
        super().__init__(config, targets)
        # Targets by layer, the owner first.
        self.members: dict[str, list[str]] = {}
        for place in self.targets:
            layer = _layer_of(place)
            if layer is not None:
                self.members.setdefault(layer, []).append(place.name)
        if not self.members:
            raise ConfigError(
                "site 'layer' needs target_modules inside numbered layers, and there are none; "
                "change target_modules, or set site to 'linear'."
            )
        if owner is not None:
            for layer, names in self.members.items():
                found = [n for n in names if re.fullmatch(owner, n.rpartition(".")[2])]
                if not found:
                    raise ConfigError(
                        f"site_kwargs['owner']={owner!r} matches none of {layer}'s target modules: "
                        f"{', '.join(name.rpartition('.')[2] for name in names)}."
                    )
                names.remove(found[0])
                names.insert(0, found[0])

    @classmethod
    def check(cls, config: MoeLoraConfig, *, owner: str | None = None, **options: Any) -> None:
        """`owner` is a regular expression."""
        if owner is not None:
            require_pattern("site_kwargs['owner']", owner)

    def expert_plan(self, place: Place, plan: LayerPlan) -> LayerPlan:
        """One expert."""
        return single_expert(plan)

    def router_plan(self, place: Place, plan: LayerPlan) -> LayerPlan | None:
        """For the owner: as many experts as the layer has target modules.

        Raises:
            ConfigError: top_k is more than that.
        """
        layer = _layer_of(place)
        names = [] if layer is None else self.members[layer]
        if place.name not in names[:1]:
            return None
        if plan.top_k > len(names):
            raise ConfigError(
                f"top_k={plan.top_k} is more than the {len(names)} target modules of a layer, "
                "which are the experts with site 'layer'; lower top_k or add target_modules."
            )
        return replace(plan, num_experts=len(names), ranks=plan.ranks[:1] * len(names))

    def connect(self, model: nn.Module, adapter: str, shared: Shared) -> None:
        """Give every linear its column."""
        for place in self.targets:
            linear = model.get_submodule(place.name)
            if isinstance(linear, MoeLoraLinear) and adapter in linear.moelora_mixture:
                linear.moelora_gate_source[adapter] = AlwaysOn()
        for names in self.members.values():
            owner = model.get_submodule(names[0])
            assert isinstance(owner, MoeLoraLinear)
            decision = Decision(owner, names[0], "layer", "site_kwargs={'owner': ...}")
            owner.moelora_decision[adapter] = decision
            for column, name in enumerate(names):
                linear = model.get_submodule(name)
                assert isinstance(linear, MoeLoraLinear)
                linear.moelora_gate_source[adapter] = LayerGates(decision, column)


@dataclass
class LayerGates(GateSource):
    """Gates of one target module of a layer.

    Attributes:
        decision: shared by the layer's target modules.
        column: which of them this one is; 0 for the owner.
    """

    decision: Decision
    column: int

    def gates(self, linear: MoeLoraLinear, adapter: str, x: Tensor) -> Tensor:
        """This module's column (T, 1); the owner decides anew."""
        if self.column == 0:
            linear.route(x, adapter)
        return self.decision.weights(x)[:, self.column : self.column + 1]

    def routing(self, linear: MoeLoraLinear, adapter: str) -> Routing | None:
        """The owner enters the losses."""
        return self.decision.routing if self.column == 0 else None

    def fixed_weights(self, linear: FoldingLinear, adapter: str) -> Tensor | None:
        """This module's of the owner's."""
        weights_E = self.decision.owner.fixed_weights(adapter)
        return None if weights_E is None else weights_E[self.column : self.column + 1]

    def mean_weights(
        self, linear: FoldingLinear, adapter: str, mean_of: Callable[[RoutedLayer], Tensor]
    ) -> Tensor:
        """This module's of the owner's."""
        return mean_of(self.decision.owner)[self.column : self.column + 1]


def _layer_of(place: Place) -> str | None:
    """The name of a module's decoder layer: up to the first number."""
    if place.layer is None:
        return None
    parts = place.name.split(".")
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: number + 1])
