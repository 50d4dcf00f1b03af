"""A router per feed-forward block, whose experts are whole blocks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ...config import MoeLoraConfig
from ...errors import ConfigError
from ...types import LayerPlan, Place
from ..block import BlockGates, MoeLoraBlock
from ..gate_source import AlwaysOn
from ..linear import MoeLoraLinear
from ..routed import Shared
from .base import Site

# What transformers calls its feed-forward modules.
FEED_FORWARD = r"(shared_)?mlp|feed_?forward|ffn?|DenseReluDense|shared_experts?"


class BlockSite(Site):
    """MixLoRA (arXiv 2404.15159), its dynamic and switch forms, LLaVA-MoLE (arXiv 2401.16160).

    A target module whose parent is a feed-forward block carries one LoRA per expert, and the block
    one router; see `layers.block.MoeLoraBlock`. Every other target module (attention) gets one
    plain LoRA, always on.

    Args:
        config: the adapter's.
        targets: the target modules.
        block: regular expression for the last part of a block's name; the common names where left
            out.
        single_rank: rank of the plain LoRA of the other target modules; that of one expert where
            left out, as in MixLoRA. The scale is alpha / rank there as well.

    Raises:
        ConfigError: no target module is in a block; an option that is out of range; a universal
            expert, which only sites that mix in a linear have.
    """

    def __init__(
        self,
        config: MoeLoraConfig,
        targets: Sequence[Place],
        *,
        block: str = FEED_FORWARD,
        single_rank: int | None = None,
    ) -> None:
        super().__init__(config, targets)
        self.check(config, block=block, single_rank=single_rank)
        pattern = re.compile(block)
        self.single_rank = single_rank
        # Targets by block.
        self.members: dict[str, list[Place]] = {}
        self.plans: dict[str, LayerPlan] = {}
        for place in self.targets:
            parent = place.name.rpartition(".")[0]
            if pattern.fullmatch(parent.rpartition(".")[2]):
                self.members.setdefault(parent, []).append(place)
        if not self.members:
            parents = sorted({place.name.split(".")[-2] for place in targets if "." in place.name})
            raise ConfigError(
                "site 'block' needs target_modules inside a feed-forward block, but theirs are in "
                f"{', '.join(parents) or 'no module'}; add the block's linears to target_modules, "
                "or say by site_kwargs={'block': 'regular expression'} what the block is called."
            )

    @classmethod
    def check(
        cls,
        config: MoeLoraConfig,
        *,
        block: str = FEED_FORWARD,
        single_rank: int | None = None,
        **options: Any,
    ) -> None:
        """A regular expression and a rank; and no universal expert."""
        try:
            re.compile(block)
        except (re.error, TypeError) as error:
            raise ConfigError(
                f"site_kwargs['block']={block!r} must be a regular expression ({error})."
            ) from error
        if single_rank is not None and not (isinstance(single_rank, int) and single_rank >= 1):
            raise ConfigError(
                f"site_kwargs['single_rank']={single_rank!r} must be an integer of at least 1."
            )
        if config.universal_expert != "none":
            raise ConfigError(
                f"universal_expert={config.universal_expert!r} does not go with site 'block', "
                "whose experts are whole blocks; set it to 'none'."
            )

    def expert_plan(self, place: Place, plan: LayerPlan) -> LayerPlan:
        """All experts in a block, one elsewhere.

        Raises:
            ConfigError: the allocation gives the linears of a block different experts.
        """
        block = place.name.rpartition(".")[0]
        if block not in self.members:
            return single_expert(plan, self.single_rank)
        first = self.plans.setdefault(block, plan)
        if (plan.num_experts, plan.top_k) != (first.num_experts, first.top_k):
            raise ConfigError(
                f"allocation gives {place.name} other num_experts or top_k than its block's first "
                "linear, but with site 'block' a block has one router; change allocation."
            )
        return plan

    def router_plan(self, place: Place, plan: LayerPlan) -> LayerPlan | None:
        """None: the block has it."""
        return None

    def connect(self, model: nn.Module, adapter: str, shared: Shared) -> None:
        """Give every block its router, and every linear its gates."""
        for place in self.targets:
            linear = model.get_submodule(place.name)
            if isinstance(linear, MoeLoraLinear) and adapter in linear.moelora_mixture:
                linear.moelora_gate_source[adapter] = AlwaysOn()
        for name, members in self.members.items():
            modules = [model.get_submodule(place.name) for place in members]
            linears = [m for m in modules if isinstance(m, MoeLoraLinear)]
            block = MoeLoraBlock.on(model.get_submodule(name), linears[0], shared)
            block.add_adapter(adapter, self.config, self.plans[name])
            for linear in linears:
                linear.moelora_gate_source[adapter] = BlockGates(block)


def single_expert(plan: LayerPlan, rank: int | None = None) -> LayerPlan:
    """One of a plan's experts alone.

    Args:
        plan: the plan.
        rank: its rank, which alpha is then divided by; the first one's where left out.
    """
    if rank is not None:
        return LayerPlan(1, 1, (rank,), plan.alpha)
    return replace(plan, num_experts=1, top_k=1, ranks=plan.ranks[:1])
