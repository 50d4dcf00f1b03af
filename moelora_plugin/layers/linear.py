"""A linear module with a mixture of LoRA experts on top.

Shape suffixes: T tokens, I in, O out, E experts.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..config import MoeLoraConfig
from ..errors import ConfigError, ExportError
from ..experts import EXPERTS, ExpertKind
from ..initialization import INITIALIZATIONS
from ..lookup import lookup
from ..routers import ROUTERS, Router
from ..types import ExpertPair, GateRescale, GateRescaleScope, LayerPlan, Routing
from .aux_loss import AuxLosses, WeightedLoss, weighted_losses

# These have in and out features that PEFT can read but do not compute x W^T.
_NOT_LINEAR = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


class Factor(nn.Module):
    """A parameter as a module, so that its name has the adapter between dots, as PEFT's own have.

    TRL finds the parameters of an adapter by ".default." where it makes a copy as the reference.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class MoeLoraLinear(nn.Module, BaseTunerLayer):
    """base(x) + s * sum_i g_i(x) B_i A_i dropout(x)     (arXiv 2502.15828, eq. 8).

    The base is any module that maps (..., in) to (..., out) and whose features PEFT can read:
    nn.Linear, transformers' Conv1D, a quantised linear. Only its forward is called.

    Modules are keyed by adapter name: `moelora_A` and `moelora_B`, whose `weight` is the stacked
    A (R, in) and B (out, R), and `moelora_router`.
    """

    adapter_layer_names = ("moelora_A", "moelora_B", "moelora_router")
    other_param_names = (
        "moelora_dropout",
        "moelora_plan",
        "moelora_scaling",
        "moelora_expert",
        "moelora_gate_rescale",
        "moelora_gate_rescale_scope",
        "moelora_aux_losses",
    )

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: MoeLoraConfig,
        plan: LayerPlan,
        aux_losses: AuxLosses,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.aux_losses = aux_losses
        self.in_features, self.out_features = _features(self.get_base_layer())
        self.moelora_A = nn.ModuleDict()
        self.moelora_B = nn.ModuleDict()
        self.moelora_router = nn.ModuleDict()
        self.moelora_dropout = nn.ModuleDict()
        self.moelora_plan: dict[str, LayerPlan] = {}
        self.moelora_scaling: dict[str, float] = {}
        self.moelora_expert: dict[str, ExpertKind] = {}
        self.moelora_gate_rescale: dict[str, GateRescale] = {}
        self.moelora_gate_rescale_scope: dict[str, GateRescaleScope] = {}
        self.moelora_aux_losses: dict[str, tuple[WeightedLoss, ...]] = {}
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters = []
        # Kept only while `analysis.routing_statistics` (or whoever sets the flag) asks for it.
        self.record_routing = False
        self.last_routing: dict[str, Routing] = {}
        # Each loss of the last micro-batch before its coefficient, by adapter; for the log.
        self.last_aux_losses: dict[str, dict[str, Tensor]] = {}
        self.update_layer(adapter_name, config, plan)

    def update_layer(self, adapter_name: str, config: MoeLoraConfig, plan: LayerPlan) -> None:
        """Add an adapter: create, initialise and place its parameters."""
        expert = lookup("experts", config.expert, EXPERTS)
        a_shape, b_shape = expert.shapes(plan, self.in_features, self.out_features)
        self.moelora_plan[adapter_name] = plan
        self.moelora_scaling[adapter_name] = plan.scaling(config.use_rslora)
        self.moelora_expert[adapter_name] = expert
        # "auto" waits for build_optimizer; until then the gradient is the ordinary one.
        mode = "none" if config.gate_rescale == "auto" else config.gate_rescale
        self.moelora_gate_rescale[adapter_name] = cast(GateRescale, mode)
        self.moelora_gate_rescale_scope[adapter_name] = cast(
            GateRescaleScope, config.gate_rescale_scope
        )
        self.moelora_aux_losses[adapter_name] = weighted_losses(config.aux_losses)
        self.moelora_A[adapter_name] = Factor(a_shape)
        self.moelora_B[adapter_name] = Factor(b_shape)
        self.moelora_router[adapter_name] = lookup("routers", config.router, ROUTERS)(
            self.in_features, plan
        )
        self.moelora_dropout[adapter_name] = (
            nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        )
        initialize = lookup("initializations", config.init, INITIALIZATIONS)
        initialize(*self.factors(adapter_name))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (..., in) to (..., out) in the base output's dtype."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for adapter in self.active_adapters:
            if adapter in self.moelora_A:
                result = result + self.update(x, adapter)
        return result.to(dtype)

    def update(self, x: Tensor, adapter: str = "default") -> Tensor:
        """One adapter's update s * sum_i g_i(x) B_i A_i dropout(x): (..., in) to (..., out)."""
        a, b = self.factors(adapter)
        x_TI = self._cast_input_dtype(x, a.dtype).reshape(-1, self.in_features)
        routing = self._router(adapter)(x_TI)
        if self.record_routing:
            self.last_routing[adapter] = _detached(routing)
        update_TO = self.moelora_expert[adapter].update(
            self.moelora_dropout[adapter](x_TI),
            a,
            b,
            routing.weights,
            self.moelora_plan[adapter],
            self.moelora_scaling[adapter],
            self.moelora_gate_rescale[adapter],
            self.moelora_gate_rescale_scope[adapter],
        )
        losses = self.moelora_aux_losses[adapter]
        if losses and self.training and torch.is_grad_enabled():
            update_TO, self.last_aux_losses[adapter] = self.aux_losses.enter(
                update_TO, routing, losses, adapter
            )
        return update_TO.view(*x.shape[:-1], self.out_features)

    def factors(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The adapter's stacked experts: A (R, in) and B (out, R)."""
        a, b = self.moelora_A[adapter], self.moelora_B[adapter]
        return cast(Factor, a).weight, cast(Factor, b).weight

    def _router(self, adapter: str) -> Router:
        return cast(Router, self.moelora_router[adapter])

    def expert_weights(self, adapter: str = "default") -> list[tuple[Tensor, Tensor]]:
        """One (A_i (r_i, in), B_i (out, r_i)) per expert: writable views without gradient."""
        a, b = self.factors(adapter)
        return self.moelora_expert[adapter].split(
            a.detach(), b.detach(), self.moelora_plan[adapter]
        )

    def router_weights(self, adapter: str = "default") -> Tensor:
        """The gate (E, in): a writable view without gradient."""
        return cast(Tensor, self._router(adapter).weight).detach()

    def expert_pairs(self) -> list[ExpertPair]:
        """The trainable (A, B) pairs, as the optimizers take them."""
        return [
            ExpertPair(*self.factors(adapter), plan.ranks, self.moelora_scaling[adapter])
            for adapter, plan in self.moelora_plan.items()
            if all(factor.requires_grad for factor in self.factors(adapter))
        ]

    def gate_parameters(self) -> list[nn.Parameter]:
        """The routers' trainable parameters."""
        return [p for p in self.moelora_router.parameters() if p.requires_grad]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters whose gates do not depend on the input into the base weight.

        Raises:
            ExportError: the gates follow the input, or the base weight is quantised.
        """
        for adapter in check_adapters_to_merge(self, adapter_names) or []:
            if adapter not in self.moelora_A:
                continue
            update = self.static_update(adapter)
            if safe_merge and not bool(torch.isfinite(update).all()):
                raise ExportError(
                    f"Merging adapter {adapter!r} gives NaN or infinite weights; it seems broken."
                )
            self.fold(update)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take every merged adapter out of the base weight again (up to rounding)."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            self.fold(-self.static_update(adapter))

    def static_update(self, adapter: str = "default", weights_E: Tensor | None = None) -> Tensor:
        """The weight update in the base weight's own layout, for fixed gates.

        Args:
            adapter: whose experts.
            weights_E: gates (E,); the router's own where it ignores the input.

        Raises:
            ExportError: no gates given and the router's follow the input.
        """
        if weights_E is None:
            weights_E = self._router(adapter).static_weights()
        if weights_E is None:
            raise ExportError(
                "The gates of this adapter follow the input, so no single weight equals it; serve "
                "it unmerged, or write an approximation with `moelora export ADAPTER --to merged "
                "--strategy mean-gate --out DIR`."
            )
        a, b = self.factors(adapter)
        update_OI = self.moelora_expert[adapter].static_update(
            a.detach(),
            b.detach(),
            weights_E.detach(),
            self.moelora_plan[adapter],
            self.moelora_scaling[adapter],
        )
        return update_OI.T if isinstance(self.get_base_layer(), Conv1D) else update_OI

    def apply_update(self, x: Tensor, update: Tensor) -> Tensor:
        """What an update in the base weight's layout adds to the output."""
        x = self._cast_input_dtype(x, update.dtype)
        return x @ update if isinstance(self.get_base_layer(), Conv1D) else x @ update.T

    def fold(self, update: Tensor) -> None:
        """Add an update in the base weight's layout to the base weight, for good.

        Raises:
            ExportError: the base weight is quantised.
        """
        weight = self._base_weight()
        weight.data = weight.data + update.to(weight.dtype)

    def _base_weight(self) -> nn.Parameter:
        weight = getattr(self.get_base_layer(), "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise ExportError(
                f"Cannot merge into {type(self.get_base_layer()).__name__}: its weight is "
                "quantised; load the base in a floating-point dtype."
            )
        return weight

    def __repr__(self) -> str:
        return "moelora." + super().__repr__()


def _features(base: nn.Module) -> tuple[int, int]:
    """In and out features, or why the module cannot be adapted."""
    with warnings.catch_warnings():
        # PEFT warns about classes it does not know and still answers; what it answers decides.
        warnings.simplefilter("ignore", UserWarning)
        in_features, out_features = (
            (None, None) if isinstance(base, _NOT_LINEAR) else _get_in_out_features(base)
        )
    if in_features is None or out_features is None:
        raise ConfigError(
            f"Cannot adapt {type(base).__name__}: experts need a linear map; remove it from "
            "target_modules or name it in exclude_modules."
        )
    return int(in_features), int(out_features)


def _detached(routing: Routing) -> Routing:
    return replace(
        routing,
        logits=routing.logits.detach(),
        probs=routing.probs.detach(),
        weights=routing.weights.detach(),
    )
