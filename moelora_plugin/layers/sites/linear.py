"""A router per target module, or one for several that read the same input.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...config import MoeLoraConfig
from ...errors import ConfigError
from ...types import LayerPlan, Place
from ..folding import FoldingLinear
from ..gate_source import Decision, GateSource
from ..linear import MoeLoraLinear
from ..routed import RoutedLayer, Shared
from .base import Site


class LinearSite(Site):
    """Every target module decides for itself (arXiv 2502.15828; MoLA, LoRAMoE, HydraLoRA, ...).

    Modules that read the same input can be given one router instead, which the first of them owns
    and evaluates once: `share=[["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]`. That is
    another method, with fewer parameters: its gates get the gradients of all of them.

    Args:
        config: the adapter's.
        targets: the target modules.
        share: groups of regular expressions for the last part of a module's name. Target modules of
            one parent that a group matches share a router; the one that the group's first matching
            expression names has it and must run first.

    Raises:
        ConfigError: `share` is no list of lists, or a group shares nothing.
    """

    def __init__(
        self,
        config: MoeLoraConfig,
        targets: Sequence[Place],
        *,
        share: Sequence[Sequence[str]] = (),
    ) -> None:
        super().__init__(config, targets)
        # The module that decides for it, by the name of each module that shares a router.
        self.owners: dict[str, str] = {}
        self.plans: dict[str, LayerPlan] = {}
        for group in _groups(share):
            followers = self._members(group)
            if not followers:
                raise ConfigError(
                    "site_kwargs['share']: no two target modules of one parent are called like "
                    f"{', '.join(map(repr, group))}; add them to target_modules or take the group "
                    "out."
                )
            self.owners.update(followers)

    @classmethod
    def check(
        cls, config: MoeLoraConfig, *, share: Sequence[Sequence[str]] = (), **options: Any
    ) -> None:
        """`share` holds regular expressions."""
        _groups(share)

    def _members(self, group: Sequence[str]) -> dict[str, str]:
        """The owner of each module in a group, those that own included, if they have followers."""
        by_parent: dict[str, list[str]] = {}
        for pattern in group:
            for place in self.targets:
                parent, _, last = place.name.rpartition(".")
                members = by_parent.setdefault(parent, [])
                if re.fullmatch(pattern, last) and place.name not in members:
                    members.append(place.name)
        return {
            name: members[0]
            for members in by_parent.values()
            if len(members) > 1
            for name in members
        }

    def expert_plan(self, place: Place, plan: LayerPlan) -> LayerPlan:
        """What the allocation says.

        Raises:
            ConfigError: modules that share a router have different experts.
        """
        owner = self.owners.get(place.name)
        if owner is not None:
            first = self.plans.setdefault(owner, plan)
            if (plan.num_experts, plan.top_k) != (first.num_experts, first.top_k):
                raise ConfigError(
                    f"site_kwargs['share'] gives {place.name} the router of {owner}, but the "
                    "allocation gives them different num_experts or top_k; change one of the two."
                )
        return plan

    def router_plan(self, place: Place, plan: LayerPlan) -> LayerPlan | None:
        """The same; None for a module that follows another."""
        return plan if self.owners.get(place.name, place.name) == place.name else None

    def connect(self, model: nn.Module, adapter: str, shared: Shared) -> None:
        """Have the followers take their owner's gates."""
        decisions: dict[str, Decision] = {}
        for name, owner_name in self.owners.items():
            owner = model.get_submodule(owner_name)
            assert isinstance(owner, MoeLoraLinear)
            if owner_name not in decisions:
                decisions[owner_name] = owner.moelora_decision[adapter] = Decision(
                    owner, owner_name, "linear", "the first pattern of its group in site_kwargs"
                )
            if name != owner_name:
                linear = model.get_submodule(name)
                assert isinstance(linear, MoeLoraLinear)
                linear.moelora_gate_source[adapter] = OwnersGates(decisions[owner_name])


@dataclass
class OwnersGates(GateSource):
    """Gates of a linear that follows another.

    Attributes:
        decision: the other's.
    """

    decision: Decision

    def gates(self, linear: MoeLoraLinear, adapter: str, x: Tensor) -> Tensor:
        """The owner's (T, E)."""
        return self.decision.weights(x)

    def fixed_weights(self, linear: FoldingLinear, adapter: str) -> Tensor | None:
        """The owner's."""
        return self.decision.owner.fixed_weights(adapter)

    def mean_weights(
        self, linear: FoldingLinear, adapter: str, mean_of: Callable[[RoutedLayer], Tensor]
    ) -> Tensor:
        """The owner's."""
        return mean_of(self.decision.owner)


def _groups(share: Any) -> list[list[str]]:
    """`share`, checked.

    Raises:
        ConfigError: no list of lists of regular expressions.
    """
    try:
        groups = [[re.compile(pattern).pattern for pattern in group] for group in share]
        if isinstance(share, str) or any(isinstance(group, str) for group in share):
            raise TypeError("text")
    except (re.error, TypeError) as error:
        raise ConfigError(
            f"site_kwargs['share']={share!r} must be a list of lists of regular expressions, like "
            "[['q_proj', 'k_proj', 'v_proj'], ['gate_proj', 'up_proj']]."
        ) from error
    return groups
