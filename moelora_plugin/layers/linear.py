"""A linear module with a mixture of LoRA experts on top.

Shape suffixes: T tokens, I in, O out, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config import MoeLoraConfig
from ..errors import ConfigError
from ..experts import EXPERTS
from ..frozen import KeepsFrozen
from ..initialization import INITIALIZATIONS, InitInput
from ..lookup import lookup, with_options
from ..scaling import scale_of
from ..types import (
    ExpertInput,
    ExpertPair,
    Frozen,
    GateRescaleScope,
    Gates,
    LayerPlan,
    Routing,
)
from .decoder import Decoder
from .folding import FoldingLinear, Mixture, with_universal
from .linear_maps import features
from .mixed import MixedBatch
from .routed import RoutedLayer, Shared


class Factors(KeepsFrozen):
    """Tensors as a module, so that their names have the adapter between dots, as PEFT's own have.

    TRL finds the parameters of an adapter by ".default." where it makes a copy as the reference.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], frozen: frozenset[str]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            if name in frozen:
                self.register_frozen(name, torch.empty(shape))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))


class MoeLoraLinear(FoldingLinear):
    """base(x) + s * sum_i g_i(x) E_i(dropout(x))     (arXiv 2502.15828, eq. 8).

    The base is any module that maps (..., in) to (..., out) and whose features PEFT can read:
    nn.Linear, transformers' Conv1D, a quantised linear. Only its forward is called.

    Modules are keyed by adapter name: `moelora_A` and `moelora_B`, whose `weight` is the stacked
    A (R, in) and B (out, R) where the expert kind has them, `moelora_extra` for what else it has,
    and the router's (see `RoutedLayer`).
    """

    adapter_layer_names = (
        "moelora_A",
        "moelora_B",
        "moelora_extra",
        *RoutedLayer.router_layer_names,
    )
    other_param_names = (
        "moelora_dropout",
        "moelora_mixture",
        "moelora_gate_source",
        "moelora_decoder",
        *RoutedLayer.router_param_names,
    )

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: MoeLoraConfig,
        plan: LayerPlan,
        shared: Shared,
        router_plan: LayerPlan | None,
        module_name: str = "",
    ) -> None:
        super().__init__(shared)
        self.base_layer = base_layer
        self.in_features, self.out_features = features(self.get_base_layer())
        self.moelora_A = nn.ModuleDict()
        self.moelora_B = nn.ModuleDict()
        self.moelora_extra = nn.ModuleDict()
        self.moelora_dropout = nn.ModuleDict()
        self.moelora_decoder: dict[str, Decoder | None] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, plan, router_plan, module_name)

    def update_layer(
        self,
        adapter_name: str,
        config: MoeLoraConfig,
        plan: LayerPlan,
        router_plan: LayerPlan | None,
        module_name: str = "",
    ) -> None:
        """Add an adapter: create, initialise and place its parameters.

        Args:
            adapter_name: its name.
            config: its configuration.
            plan: this module's experts.
            router_plan: what a router here decides about; without one a `GateSource` must be set.
            module_name: the module's full name, for initialisations that look something up.
        """
        scaling = scale_of(config, plan, self.in_features)
        if config.universal_expert != "none":
            plan = plan.with_universal()
        experts = with_options(
            "expert_kwargs",
            lookup("experts", config.expert, EXPERTS),
            config.expert_kwargs,
            plan,
            self.in_features,
            self.out_features,
        )
        _refuse_other_shapes(config.stored_shapes, module_name, experts.shapes())
        if router_plan is not None:
            self.add_router(adapter_name, config, router_plan, self.in_features)
        self.moelora_decoder.pop(adapter_name, None)
        self.moelora_mixture[adapter_name] = Mixture(
            plan,
            experts,
            scaling,
            cast(GateRescaleScope, config.gate_rescale_scope),
            config.universal_expert,
        )
        self.set_gate_rescale(adapter_name, config)
        self.moelora_dropout[adapter_name] = (
            nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        )
        self._add_tensors(adapter_name, config, module_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's own, and for what decides about the adapter here."""
        source = self.moelora_gate_source.get(adapter_name)
        super().delete_adapter(adapter_name)
        if source is not None:
            source.forget(self, adapter_name)

    def _add_tensors(self, adapter: str, config: MoeLoraConfig, module_name: str) -> None:
        mixture = self.moelora_mixture[adapter]
        experts, plan = mixture.experts, mixture.plan
        initialize = with_options(
            "init_kwargs",
            lookup("initializations", config.init, INITIALIZATIONS),
            config.init_kwargs,
        )
        shapes, frozen = experts.shapes(), experts.frozen
        for name, container in (("A", self.moelora_A), ("B", self.moelora_B)):
            if name in shapes:
                is_frozen = frozenset({"weight"} if name in frozen else ())
                container[adapter] = Factors({"weight": shapes[name]}, is_frozen)
        extra = {name: shape for name, shape in shapes.items() if name not in ("A", "B")}
        offset_rank = initialize.offset_rank(plan)
        if offset_rank:
            extra["offset_A"] = (offset_rank, self.in_features)
            extra["offset_B"] = (self.out_features, offset_rank)
        if extra:
            self.moelora_extra[adapter] = Factors(extra, frozen | {"offset_A", "offset_B"})
        tensors = {name: tensor.detach() for name, tensor in self.tensors(adapter).items()}
        if initialize.reads_data and (config.inference_mode or config.from_file):
            for tensor in tensors.values():  # the values come from the adapter's file
                tensor.zero_()
            return
        experts.reset(tensors)
        inputs = InitInput(
            {name: tensor for name, tensor in tensors.items() if name not in frozen},
            experts.split(tensors),
            self._float_base_weight,
            (self.out_features, self.in_features),
            plan,
            mixture.scaling,
            module_name,
        )
        initialize.check_experts(inputs)
        initialize(inputs)
        if adapter in self.moelora_gate and not any(t.is_meta for t in tensors.values()):
            self._score(adapter).read_experts(experts.split(tensors))

    def tensors(self, adapter: str = "default") -> dict[str, Tensor]:
        """The adapter's expert tensors by name: "A", "B" and what else the expert kind has."""
        found: dict[str, Tensor] = {}
        if (factors := self.part("moelora_A", adapter)) is not None:
            found["A"] = cast(Tensor, factors.weight)
        if (factors := self.part("moelora_B", adapter)) is not None:
            found["B"] = cast(Tensor, factors.weight)
        if (extra := self.part("moelora_extra", adapter)) is not None:
            found.update(extra.named_parameters())
        return found

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (..., in) to (..., out) in the base output's dtype."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            output: Tensor = self.base_layer(x, *args, **kwargs)
            return output
        if (mixed := self.shared.mixed) is not None:
            return self._mixed_batch_forward(mixed, x, *args, **kwargs)
        adapters = [name for name in self.active_adapters if name in self.moelora_mixture]
        result = base = self._base_output(x, adapters, *args, **kwargs)
        is_decoding = not (self.training or self.record_routing or torch.is_grad_enabled())
        for adapter in adapters:
            decoder = self._decoder(adapter) if is_decoding else None
            decoded = None if decoder is None else decoder(x, result)
            if decoded is None:
                decoded = self._mixed_output(x, adapter, base, onto=result)
            result = decoded
        return result.to(base.dtype)

    def _mixed_batch_forward(
        self, mixed: MixedBatch, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The output where each sequence has the update of its own adapter, or of none."""
        if mixed.only is not None:
            adapters = [a for a in (mixed.only,) if a in self.moelora_mixture]
            base = self._base_output(x, adapters, *args, **kwargs)
            result = base
            for adapter in adapters:
                result = self._mixed_output(x, adapter, base, onto=base)
            return result.to(base.dtype)
        base = cast(Tensor, self.base_layer(x, *args, **kwargs))
        given = mixed.sequences(x)
        of_base = base.view(*given.shape[:-1], base.shape[-1])
        result = of_base.clone()
        for adapter, index in mixed.groups(len(given)).items():
            if adapter in self.moelora_mixture:
                with mixed.rows(index):
                    mine = of_base[index]
                    result[index] = self._mixed_output(given[index], adapter, mine, onto=mine).to(
                        base.dtype
                    )
        return result.view(base.shape)

    def _decoder(self, adapter: str) -> Decoder | None:
        """What computes the same as `_mixed_output` for a few tokens, where there is such."""
        if adapter not in self.moelora_decoder:
            self.moelora_decoder[adapter] = Decoder.of(self, adapter)
        return self.moelora_decoder[adapter]

    def _base_output(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """What the base makes of x, from a gate source where that has it for less."""
        if self.moelora_gate_source:
            for adapter in adapters:
                source = self.moelora_gate_source.get(adapter)
                base = None if source is None else source.base_output(self, x)
                if base is not None:
                    return base
        output: Tensor = self.base_layer(x, *args, **kwargs)
        return output

    def update(self, x: Tensor, adapter: str = "default") -> Tensor:
        """One adapter's update s * sum_i g_i(x) E_i(dropout(x)): (..., in) to (..., out)."""
        return self._mixed_output(x, adapter, self.base_layer(x))

    def _mixed_output(
        self, x: Tensor, adapter: str, base: Tensor, onto: Tensor | None = None
    ) -> Tensor:
        """One adapter's update, added to `onto` where that is given: the output so far."""
        mixture = self.moelora_mixture[adapter]
        tensors = self.tensors(adapter)
        dtype = next(iter(tensors.values())).dtype
        source = self.moelora_gate_source.get(adapter)
        matrix = None if source is not None else self.gate_matrix(adapter)
        if matrix is not None and matrix.dtype != dtype:
            matrix = None
        dropout = self._dropout(adapter)
        x_TI = x.reshape(-1, self.in_features)
        # A subclass of Tensor may have no values that pairs could be counted by.
        by_groups = type(x) is Tensor and self.by_groups(x_TI.shape[0], x.device.type, adapter)
        projection = None
        if not by_groups:
            projection = mixture.experts.project(tensors, x_TI, matrix, dropout, self.training)
        product = None if projection is None else projection.logits
        if projection is None:
            x_TI = self._cast_input_dtype(x_TI, dtype)
            dropped_TI = torch.dropout(x_TI, dropout, True) if dropout else x_TI
        else:
            dropped_TI = x_TI  # not read again
        if product is None or self._router(adapter).reads_input:
            x = self._cast_input_dtype(x, dtype)

        routing: Routing | None
        if source is None:
            routing = self.route(x, adapter, tensors.get("A"), product)
            weights_TE = routing.weights
        else:
            weights_TE = source.gates(self, adapter, x)
            routing = source.routing(self, adapter)
        gates = Gates(
            with_universal(weights_TE, mixture.universal),
            mixture.scaling,
            self.moelora_gate_rescale[adapter],
            mixture.scope,
        )
        base_TO = base.reshape(-1, self.out_features)
        inputs = ExpertInput(
            dropped_TI, base_TO, self._float_base_weight, self.training, projection, by_groups
        )
        if onto is None:
            mixed_TO = mixture.experts.update(tensors, inputs, gates)
        else:
            onto_TO = onto.reshape(-1, self.out_features)
            mixed_TO = mixture.experts.add_update(onto_TO, tensors, inputs, gates)
        if "offset_A" in tensors:
            x_TI = self._cast_input_dtype(x_TI, dtype)
            mixed_TO = mixed_TO - x_TI @ tensors["offset_A"].T @ tensors["offset_B"].T
        if routing is not None and self.moelora_aux_losses[adapter]:
            loss_input = self.loss_input(routing, x)
            if source is None:  # the router's experts are the ones here
                loss_input = replace(
                    loss_input,
                    experts=functools.partial(mixture.experts.split, tensors),
                    outputs=functools.partial(_expert_outputs, x_TI, tensors, mixture),
                )
            mixed_TO = self.enter_losses(mixed_TO, loss_input, adapter)
        return mixed_TO.view(*x.shape[:-1], self.out_features)

    def _dropout(self, adapter: str) -> float:
        """Probability that an entry of x is dropped now; TRL sets it to 0 on the module."""
        module = self.part("moelora_dropout", adapter)
        return module.p if isinstance(module, nn.Dropout) and module.training else 0.0

    def by_groups(self, tokens: int, device_type: str, adapter: str = "default") -> bool:
        """Whether the selected experts alone are computed for so many tokens."""
        source, mixture = self.moelora_gate_source.get(adapter), self.moelora_mixture[adapter]
        selected = (self._router(adapter) if source is None else source).experts_per_row
        if selected is None or mixture.universal == "complement":  # may be 0, and still learns
            return False
        if mixture.universal == "one":
            selected += 1
        return mixture.experts.by_groups(tokens, selected, device_type)

    def expert_weights(self, adapter: str = "default") -> list[tuple[Tensor, Tensor]]:
        """One (A_i (r_i, in), B_i (out, r_i)) per expert: writable views without gradient."""
        tensors = {name: tensor.detach() for name, tensor in self.tensors(adapter).items()}
        return self.moelora_mixture[adapter].experts.split(tensors)

    def expert_pairs(self) -> list[ExpertPair]:
        """The (A, B) pairs that train, as the optimizers take them.

        One factor may be frozen by its expert kind, but not by hand.
        """
        pairs = []
        for adapter, mixture in self.moelora_mixture.items():
            frozen = {id(self.tensors(adapter)[name]) for name in mixture.experts.frozen}
            for pair in self._pairs(adapter):
                kept = [s for s, f in (("a", pair.a), ("b", pair.b)) if id(f) in frozen]
                side = cast(Frozen, kept[0] if len(kept) == 1 else "none")
                factors = [f for f in (pair.a, pair.b) if id(f) not in frozen]
                if factors and all(factor.requires_grad for factor in factors):
                    pairs.append(replace(pair, frozen=side))
        return pairs

    def unpaired_parameters(self) -> list[nn.Parameter]:
        """Trainable expert tensors without a Riemannian metric."""
        found = []
        for adapter in self.moelora_mixture:
            paired = {id(factor) for pair in self._pairs(adapter) for factor in (pair.a, pair.b)}
            found += [
                cast(nn.Parameter, tensor)
                for tensor in self.tensors(adapter).values()
                if tensor.requires_grad and id(tensor) not in paired
            ]
        return found

    def _pairs(self, adapter: str) -> list[ExpertPair]:
        mixture = self.moelora_mixture[adapter]
        return mixture.experts.pairs(self.tensors(adapter), mixture.scaling)

    def __repr__(self) -> str:
        return "moelora." + super().__repr__()


def _expert_outputs(
    x_TI: Tensor, tensors: Mapping[str, Tensor], mixture: Mixture, index_M: Tensor
) -> Tensor:
    """Each expert's own output s B_i A_i x (M, E, O) for some tokens, without dropout."""
    x_MI = x_TI[index_M].to(next(iter(tensors.values())).dtype)
    return mixture.experts.outputs(tensors, x_MI, mixture.scaling)


def _refuse_other_shapes(
    stored: Mapping[str, tuple[int, ...]], module: str, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare with the adapter's file before anything of that size is made.

    Raises:
        ConfigError: a tensor there has another shape.
    """
    for name, shape in shapes.items():
        tensor = f"moelora_{name}.weight" if name in ("A", "B") else f"moelora_extra.{name}"
        found = stored.get(f"base_model.model.{module}.{tensor}", shape)
        if tuple(found) != tuple(shape):
            raise ConfigError(
                f"{module}.{tensor} is {tuple(found)} in the file and would be {tuple(shape)}"
            )
