"""One router for the whole model, which decides in a pass of its own (X-LoRA).

Shape suffixes: B sequences, S positions, T tokens (B times S), H the model's hidden size,
E experts, L adapted linears, N rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...call import Call
from ...call.reading import cache_among, named_arguments
from ...config import MoeLoraConfig
from ...errors import ConfigError
from ...routers import Router
from ...routers.modifiers import RouterModifiers
from ...routers.scores import Score
from ...types import LayerPlan, Place, Routing, Rows
from ..folding import FoldingLinear
from ..gate_source import GateSource
from ..linear import MoeLoraLinear
from ..routed import RoutedLayer, Shared
from .base import Site


class ModelSite(Site):
    """One decision per token for all target modules, from the model's last hidden states.

    X-LoRA (arXiv 2402.07148): a first pass without gradient, whose gates are `scaling_pass_value`
    for every expert, gives the last hidden states; the router reads those and its gates are used in
    a second pass, which the router's gradient comes from. Written as our parts:

        xlora_depth 1        router_score "linear" with bias; deeper "mlp"
        enable_softmax       router "softmax", or "topk" without renormalize for top_k_lora
        enable_softmax_topk  router "topk": the softmax over the selected logits
        softmax_temperature  router_modifiers {"temperature": ...}
        use_trainable_adapters   expert_kwargs without "frozen"

    Every call runs all but the model's head twice, and generation can use no cache, which one pass
    would fill for the other. The first pass runs the model as it is, dropout included while
    training (as PEFT's does). The router's parameters belong to the first target module and are
    saved with it. Auxiliary losses enter once, over all decisions of the call together.

    Activation checkpointing needs `use_reentrant=False` (the default of transformers 5.23), since
    the reentrant kind cannot take gradients to a tensor that all its regions share.

    Args:
        config: the adapter's.
        targets: the target modules, in the model's order.
        layerwise: gates for each target module by itself, from one router with E logits for each
            (X-LoRA's layerwise_scalings); otherwise all share one decision.
        scaling_pass_value: the gates of the first pass.
    """

    def __init__(
        self,
        config: MoeLoraConfig,
        targets: Sequence[Place],
        *,
        layerwise: bool = False,
        scaling_pass_value: float = 0.0,
    ) -> None:
        super().__init__(config, targets)
        self.layerwise = layerwise
        self.scaling_pass_value = scaling_pass_value
        self._plan: LayerPlan | None = None

    def expert_plan(self, place: Place, plan: LayerPlan) -> LayerPlan:
        """What the allocation says, which must be as many experts everywhere."""
        first = self._plan = self._plan or plan
        if (plan.num_experts, plan.top_k) != (first.num_experts, first.top_k):
            raise ConfigError(
                f"site='model' has one decision for all modules, but allocation="
                f"{self.config.allocation!r} gives {place.name} {plan.num_experts} experts with "
                f"top_k {plan.top_k}, not {first.num_experts} with {first.top_k}; use one with the "
                "same numbers everywhere."
            )
        return plan

    def router_plan(self, place: Place, plan: LayerPlan) -> LayerPlan | None:
        """None: the router is the model's."""
        return None

    def connect(self, model: nn.Module, adapter: str, shared: Shared) -> None:
        """Give the first target module the router, all of them its gates, the model its two passes.

        Raises:
            ConfigError: the model says no hidden size, or the router cannot decide layer by layer.
        """
        linears = [
            module
            for module in model.modules()
            if isinstance(module, MoeLoraLinear) and adapter in module.moelora_mixture
        ]
        assert self._plan is not None
        owner, plan = linears[0], self._plan
        layers = len(linears) if self.layerwise else 0
        wide = replace(plan, num_experts=plan.num_experts * layers) if layers else None
        owner.add_router(adapter, self.config, plan, _hidden_size(model), score_plan=wide)
        router = cast(Router, owner.moelora_router[adapter])
        if layers and router.reads_input:
            raise ConfigError(
                f"router={self.config.router!r} reads the input itself and cannot decide for each "
                "module apart; set site_kwargs['layerwise'] to False or choose another router."
            )
        owner._move_adapter_to_device_of_base_layer(adapter)
        trains = adapter in owner.active_adapters and not self.config.inference_mode
        for part in (owner.moelora_gate[adapter], router):
            part.requires_grad_(trains)
        passes = _TwoPasses(owner, adapter, plan.num_experts, layers, self.scaling_pass_value)
        for index, linear in enumerate(linears):
            linear.moelora_gate_source[adapter] = _ModelGates(passes, index)
        shared.call.watch(model)  # before our hook: it takes out what is not the model's
        model.register_forward_pre_hook(passes.begin, with_kwargs=True)


class _TwoPasses:
    """The router's decisions, by the model's call that they were taken in.

    `CallContext` says which call a layer is part of, also where it is recomputed in the backward,
    so several calls may wait for theirs; a decision lives as long as its call.

    Args:
        owner: the linear that holds the router.
        adapter: whose router.
        num_experts: E.
        layers: L where each linear has gates of its own, else 0.
        scaling_pass_value: the gates of the first pass.
    """

    def __init__(
        self,
        owner: MoeLoraLinear,
        adapter: str,
        num_experts: int,
        layers: int,
        scaling_pass_value: float,
    ) -> None:
        self.owner = owner
        self.adapter = adapter
        self.num_experts = num_experts
        self.layers = layers
        self.scaling_pass_value = scaling_pass_value
        self._decisions: WeakKeyDictionary[Call, Routing] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """Without decisions: they are part of a graph, which cannot be copied or pickled."""
        return {name: value for name, value in self.__dict__.items() if name != "_decisions"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _decisions=WeakKeyDictionary())

    def routing(self, linear: MoeLoraLinear) -> Routing | None:
        """The decision, or None in a first pass (this adapter's or another's).

        Raises:
            ConfigError: there is none, or the kind of checkpointing cannot differentiate it.
        """
        shared = self.owner.shared
        if shared.is_first_pass:
            return None
        routing = self._decisions.get(shared.call.call)
        if routing is None:
            raise ConfigError(
                "site='model' decides when the whole model is called, but a part of it was called "
                "by itself; call the model, or set site to 'linear'."
            )
        if linear.training and routing.weights.requires_grad and not torch.is_grad_enabled():
            raise ConfigError(
                "site='model' cannot be differentiated under reentrant checkpointing; set "
                "gradient_checkpointing_kwargs to {'use_reentrant': False}."
            )
        return routing

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before each call of the model: the first pass, and the decision."""
        if not self._is_on(module):
            return
        shared = self.owner.shared
        shared.is_first_pass = True
        try:
            hidden_BSH = _last_hidden_states(module, args, kwargs)
        finally:
            shared.is_first_pass = False
        call = shared.call.call
        if self.owner.stream != shared.call.decoder:
            raise _other_tokens()
        if shared.mixed is None:
            self._decisions[call] = self._route(hidden_BSH)
            return
        index = shared.mixed.groups(len(hidden_BSH))[self.adapter]
        with shared.mixed.rows(index):
            self._decisions[shared.call.call] = self._route(hidden_BSH[index])

    def _is_on(self, module: nn.Module) -> bool:
        """Whether this adapter acts in the call; hooks outlive adapters that are taken out."""
        owner = self.owner
        source = owner.moelora_gate_source.get(self.adapter)
        return (
            isinstance(source, _ModelGates)
            and source.passes is self
            and self.adapter in owner.acting_adapters
            and not owner.disable_adapters
            and not owner.merged
            and any(part is owner for part in module.modules())
        )

    def _route(self, hidden_BSH: Tensor) -> Routing:
        """The decision about each token, or about each token and linear (T * L rows)."""
        owner, adapter = self.owner, self.adapter
        gate = next(owner.moelora_gate[adapter].parameters(), hidden_BSH)
        hidden_BSH = hidden_BSH.to(gate.device, gate.dtype)
        if not self.layers:
            routing = owner.route(hidden_BSH, adapter)
            inputs = owner.loss_input(routing, hidden_BSH)
        else:
            routing = self._route_layerwise(hidden_BSH)
            real_T = owner.view(owner.shared.call.call, hidden_BSH).real_T
            inputs = replace(
                owner.loss_input(routing, hidden_BSH), real=_repeat(real_T, self.layers)
            )
        return routing.with_weights(owner.enter_losses(routing.weights, inputs, adapter))

    def _route_layerwise(self, hidden_BSH: Tensor) -> Routing:
        """The score gives L times E logits to a row; each E of them are decided about apart."""
        owner, adapter, layers = self.owner, self.adapter, self.layers
        router = cast(Router, owner.moelora_router[adapter])
        modifiers = cast(RouterModifiers, owner.moelora_modifiers[adapter])
        view = owner.view(owner.shared.call.call, hidden_BSH)
        rows = owner.moelora_input[adapter].rows(hidden_BSH, view)

        def score(given: Rows, a: Tensor | None) -> Tensor:
            own = replace(rows, x=given.x)  # as modifiers have it
            logits: Tensor = owner.moelora_gate[adapter](own, a)
            return logits.reshape(-1, self.num_experts)

        wide = replace(
            rows, ids=_repeat(rows.ids, layers), real=_repeat(rows.real, layers), row_of_token=None
        )
        routing: Routing = router(wide, cast(Score, score), modifiers)
        if rows.row_of_token is not None:
            each_L = torch.arange(layers, device=rows.row_of_token.device)
            routing = routing.rows((rows.row_of_token.unsqueeze(-1) * layers + each_L).flatten())
        return routing


class _ModelGates(GateSource):
    """What the model's router decided for one linear.

    Args:
        passes: the decision.
        index: which of the L linears.
    """

    def __init__(self, passes: _TwoPasses, index: int) -> None:
        self.passes = passes
        self.index = index

    def gates(self, linear: MoeLoraLinear, adapter: str, x: Tensor) -> Tensor:
        """The router's for each token, in a first pass the same for all.

        Raises:
            ConfigError: this linear sees other tokens than the model's input.
        """
        passes, tokens = self.passes, x.numel() // x.shape[-1]
        routing = passes.routing(linear)
        if routing is None:
            dtype = torch.promote_types(x.dtype, torch.float32)
            shape = (tokens, passes.num_experts)
            return x.new_full(shape, passes.scaling_pass_value, dtype=dtype)
        call = linear.shared.call.call
        if linear.stream != linear.shared.call.decoder or call.is_memory(linear.stream, x):
            raise _other_tokens()
        if passes.layers:
            index = torch.arange(self.index, len(routing.weights), passes.layers)
            routing = routing.rows(index.to(routing.weights.device))
        if linear.record_routing and (passes.layers or linear is passes.owner):
            linear.record(adapter, routing, linear.view(call, x).real_among(x.shape[:-1]))
        if len(routing.weights) != tokens:
            raise ConfigError(
                f"site='model' decides about the model's {len(routing.weights)} tokens, but a "
                f"target module sees {tokens}; take it out of target_modules."
            )
        return routing.weights.to(x.device)

    def fixed_weights(self, linear: FoldingLinear, adapter: str) -> Tensor | None:
        """The router's, where all linears share them."""
        return None if self.passes.layers else self.passes.owner.fixed_weights(adapter)

    def mean_weights(
        self, linear: FoldingLinear, adapter: str, mean_of: Callable[[RoutedLayer], Tensor]
    ) -> Tensor:
        """The mean of the decisions that this linear follows."""
        return mean_of(linear if self.passes.layers else self.passes.owner)


def _last_hidden_states(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """What the model makes of a call without its head: the last hidden states (B, S, H).

    Raises:
        ConfigError: a cache is in use, or the model has no such output.
    """
    given = named_arguments(module, args, kwargs)
    if given.get("use_cache") or cache_among(given) is not None:
        raise ConfigError(
            "site='model' reads all tokens twice, which a cache of the past rules out; pass "
            "use_cache=False (also to generate)."
        )
    body = getattr(module, "base_model", module)  # transformers' name for it
    call = module.forward if body is module else body  # our hooks are on the model
    parameters = inspect.signature(body.forward).parameters
    wanted = {name: value for name, value in given.items() if name in parameters}
    if "use_cache" in parameters:
        wanted["use_cache"] = False
    with torch.no_grad():
        output = call(**{**wanted, "return_dict": True})
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise ConfigError(
            f"site='model' needs a model that gives last_hidden_state, which "
            f"{type(body).__name__} does not; set site to 'linear'."
        )
    return cast(Tensor, hidden)


def _other_tokens() -> ConfigError:
    return ConfigError(
        "site='model' decides about the tokens of the model's text decoder, and a target module "
        "sees others (an encoder's, an image's); take it out of target_modules, or set site to "
        "'linear'."
    )


def _hidden_size(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "hidden_size", None)
    if size is None:
        raise ConfigError(
            f"site='model' needs hidden_size in the configuration of {type(model).__name__}, which "
            "has none; set site to 'linear'."
        )
    return int(size)


def _repeat(tensor: Tensor | None, times: int) -> Tensor | None:
    return None if tensor is None else tensor.repeat_interleave(times, 0)
