"""A layer with a router of its own.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..call import Call, CallContext
from ..config import MoeLoraConfig
from ..errors import ConfigError
from ..frozen import freeze_again
from ..lookup import lookup, with_options
from ..losses import LossInput
from ..ops.finite import refuse_damaged
from ..per_thread import PerThread, nothing
from ..routers import ROUTERS, Router
from ..routers.inputs import INPUTS, RouterInput
from ..routers.modifiers import MODIFIERS, RouterModifiers
from ..routers.scores import SCORES, Score
from ..types import GateRescale, LayerPlan, Routing
from .aux_loss import AuxLosses, WeightedLoss, weighted_losses
from .gate_source import Decision

if TYPE_CHECKING:
    from .mixed import MixedBatch


class Shared:
    """What the layers of one model share."""

    def __init__(self) -> None:
        self.call = CallContext()
        self.aux_losses = AuxLosses()
        self._is_first_pass: PerThread[bool] = PerThread(bool)
        self._mixed: PerThread[MixedBatch | None] = PerThread(nothing)

    @property
    def is_first_pass(self) -> bool:
        """Whether what runs is a pass before the call's own, which routers of a model decide by."""
        return self._is_first_pass.get()

    @is_first_pass.setter
    def is_first_pass(self, value: bool) -> None:
        self._is_first_pass.set(value)

    @property
    def mixed(self) -> MixedBatch | None:
        """Which adapter each sequence belongs to, where that is not the same for all."""
        return self._mixed.get()

    @mixed.setter
    def mixed(self, value: MixedBatch | None) -> None:
        self._mixed.set(value)


class RoutedLayer(nn.Module, BaseTunerLayer):
    """Routers by adapter, what is recorded of them, and how their auxiliary losses enter.

    Modules are keyed by adapter name: `moelora_gate` (the gate: parameters behind the logits),
    `moelora_router` (from logits to gates; most have no parameters) and `moelora_modifiers`.
    """

    router_layer_names = ("moelora_gate", "moelora_router")
    # Modifiers hold counts, which PEFT could not ask to train.
    router_param_names = (
        "moelora_modifiers",
        "moelora_input",
        "moelora_aux_losses",
        "moelora_gate_rescale",
        "moelora_decision",
    )

    # What `peft.helpers.disable_input_dtype_casting` switches.
    cast_input_dtype_enabled = True

    def __init__(self, shared: Shared) -> None:
        super().__init__()
        self.shared = shared
        # The part of the model whose tokens are seen here; None for the model's own, "" for tokens
        # that no part's arguments describe. See `assign_streams`.
        self.stream: str | None = None
        # Whether they are an image's or a sound's, and not those of the text.
        self.sees_images = False
        self.moelora_gate = nn.ModuleDict()
        self.moelora_router = nn.ModuleDict()
        self.moelora_modifiers = nn.ModuleDict()
        self.moelora_input: dict[str, RouterInput] = {}
        self.moelora_aux_losses: dict[str, tuple[WeightedLoss, ...]] = {}
        # The exponent of the gates that are applied here, by adapter.
        self.moelora_gate_rescale: dict[str, GateRescale] = {}
        # Where decisions are noted that other layers follow, by adapter.
        self.moelora_decision: dict[str, Decision] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        # Kept only while `analysis.routing_statistics` (or whoever sets the flag) asks for it.
        self.record_routing = False
        self.last_routing: dict[str, Routing] = {}
        # Which of its tokens were real (T,), where a mask said so.
        self.last_real: dict[str, Tensor | None] = {}
        # Each loss of the last micro-batch before its coefficient, by adapter; for the log.
        self.last_aux_losses: dict[str, dict[str, Tensor]] = {}

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Torch's own, after a look at the values: every loader of PEFT's and Trainer's comes here.

        Raises:
            AdapterError: see `refuse_damaged`.
        """
        mark = f"{prefix}moelora_"
        refuse_damaged({key: value for key, value in state_dict.items() if key.startswith(mark)})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def view(self, call: Call, x: Tensor) -> Call:
        """What a call of the model says about the tokens of x (..., in), which this layer sees."""
        return call.seen_by(self.stream, x)

    @property
    def acting_adapters(self) -> Sequence[str]:
        """The active ones, or those that a mixed batch names."""
        mixed, active = self.shared.mixed, cast(Sequence[str], self.active_adapters)
        return active if mixed is None else tuple(dict.fromkeys(mixed.names))

    @property
    def aux_losses(self) -> AuxLosses:
        """How much the losses weigh, for all layers of the model."""
        return self.shared.aux_losses

    def add_router(
        self,
        adapter: str,
        config: MoeLoraConfig,
        plan: LayerPlan,
        in_features: int,
        score_plan: LayerPlan | None = None,
    ) -> None:
        """Create an adapter's router.

        Args:
            adapter: its name.
            config: its configuration.
            plan: the experts that are decided about.
            in_features: width of what the router reads.
            score_plan: what the score gives logits for, where that is more than one decision.
        """
        self.moelora_input[adapter] = with_options(
            "router_input_kwargs",
            lookup("router_inputs", config.router_input, INPUTS),
            config.router_input_kwargs,
        )
        self.moelora_gate[adapter] = with_options(
            "router_score_kwargs",
            lookup("router_scores", config.router_score, SCORES),
            config.router_score_kwargs,
            in_features,
            score_plan or plan,
        )
        self.moelora_router[adapter] = with_options(
            "router_kwargs",
            lookup("routers", config.router, ROUTERS),
            config.router_kwargs,
            in_features,
            plan,
        )
        if "balance_bias" in config.router_modifiers and not self._router(adapter).by_preference:
            raise ConfigError(
                f"router_modifiers['balance_bias'] acts on routers that select the best experts, "
                f"which router={config.router!r} does not; take it out, or set router to 'topk'."
            )
        self.moelora_modifiers[adapter] = RouterModifiers(
            [
                lookup("router_modifiers", name, MODIFIERS)(value, plan)
                for name, value in config.router_modifiers.items()
            ]
        )
        for container in (self.moelora_gate, self.moelora_router, self.moelora_modifiers):
            _refuse_buffers(container[adapter])
        before_call = self.shared.call.before_call
        if config.router_modifiers and self.before_call not in before_call:
            before_call.append(self.before_call)
        self.moelora_aux_losses[adapter] = weighted_losses(config.aux_losses)

    def place_router(self, adapter: str, like: Tensor) -> None:
        """Put a router that was made after injection where a tensor is, in its dtype."""
        if not like.is_meta:  # which has no values; they come with the adapter's file
            for container in (self.moelora_gate, self.moelora_router, self.moelora_modifiers):
                container[adapter].to(like.device, like.dtype)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """PEFT's own, which has all of an active adapter train: frozen tensors stay frozen."""
        super().set_adapter(adapter_names, inference_mode)
        freeze_again(self)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """PEFT's own; frozen tensors stay frozen."""
        super().set_requires_grad(adapter_names, requires_grad)
        freeze_again(self)

    def set_gate_rescale(self, adapter: str, config: MoeLoraConfig) -> None:
        """Take an adapter's exponent from its configuration.

        "auto" waits for `build_optimizer`; until then the gradient is the ordinary one.
        """
        mode = "none" if config.gate_rescale == "auto" else config.gate_rescale
        self.moelora_gate_rescale[adapter] = cast(GateRescale, mode)

    def gate_matrix(self, adapter: str) -> Tensor | None:
        """The gate (E, in) whose product with x, token by token, `route` can be given.

        None where the router reads something else, or has one expert to choose from: the products
        of a single expert are LoRA's own.
        """
        if (
            not self.moelora_input[adapter].by_token
            or self._modifiers(adapter).change_input
            or self.experts_decided_about(adapter) == 1
        ):
            return None
        return self._score(adapter).matrix()

    def part(self, kind: str, adapter: str) -> nn.Module | None:
        """An adapter's module in the container `kind`, None where it has none there.

        Past nn.Module's and nn.ModuleDict's own access, which a decoded token would feel.
        """
        container = cast(nn.ModuleDict, self._modules[kind])
        return container._modules.get(adapter)

    def route(
        self, x: Tensor, adapter: str, a: Tensor | None = None, product: Tensor | None = None
    ) -> Routing:
        """The decision for every token of x (..., in), T of them.

        Args:
            x: the layer's input.
            adapter: whose router.
            a: the experts' stacked A (R, in), for scores that read it.
            product: x times `gate_matrix` (T, E), where that is there already.
        """
        call = self.shared.call.call
        view, router, modifiers = (
            self.view(call, x),
            self._router(adapter),
            self._modifiers(adapter),
        )
        rows = self.moelora_input[adapter].rows(x, view)
        rows.product = product
        if rows.row_of_token is None and (router.mixes_rows or modifiers.mixes_rows):
            rows.documents = view.parts_of(x.shape[:-1])
        routing: Routing = router(rows, self._score(adapter), modifiers, a)
        if rows.row_of_token is not None:
            routing = routing.rows(rows.row_of_token)
        if (decision := self.moelora_decision.get(adapter)) is not None:
            decision.take(routing, call)
        if self.record_routing:
            self.record(adapter, routing, view.real_among(x.shape[:-1]))
        return routing

    def mixes_rows(self, adapter: str) -> bool:
        """Whether, outside of training, a token's gates depend on the others of its sequence."""
        router = self._router(adapter)
        return self._modifiers(adapter).mixes_rows or (router.mixes_rows and not router.balances)

    def record(self, adapter: str, routing: Routing, real_T: Tensor | None) -> None:
        """Keep a decision for whoever has set `record_routing`."""
        self.last_routing[adapter] = routing.detach()
        self.last_real[adapter] = real_T

    def enter_losses(self, update: Tensor, inputs: LossInput, adapter: str) -> Tensor:
        """Tie the adapter's auxiliary losses to the update, while training."""
        losses = self.moelora_aux_losses[adapter]
        if losses and self.training and torch.is_grad_enabled():
            update, self.last_aux_losses[adapter] = self.aux_losses.enter(
                update, inputs, losses, adapter
            )
        return update

    def loss_input(self, routing: Routing, x: Tensor) -> LossInput:
        """What auxiliary losses may read of a decision about x (..., in), but for the experts."""
        call, tokens = self.view(self.shared.call.call, x), len(routing.weights)
        documents = call.documents if call.ids else None  # what reads them reads ids as well
        if documents is not None and len(documents.of_T) != tokens:
            documents = None
        given = {name: value.reshape(-1).to(x.device) for name, value in call.ids.items()}
        ids = {}
        for name, value in given.items():
            if documents is not None and len(value) == documents.count > 1:
                ids[name] = value[documents.of_T]
            elif len(value) and tokens % len(value) == 0:
                ids[name] = value.repeat_interleave(tokens // len(value))
        batch = x.shape[0] if x.ndim == 3 else 1
        real_T = call.real_among(x.shape[:-1])
        return LossInput(routing, real_T, ids, batch=batch, documents=documents)

    def before_call(self, call: Call) -> None:
        """Let modifiers change their state, before a training call of the model."""
        for adapter in self.active_adapters:
            if adapter in self.moelora_modifiers:
                self._modifiers(adapter).before_call()

    def fixed_weights(self, adapter: str) -> Tensor | None:
        """The gates (E,) where they ignore the input, so that a merge is exact; else None."""
        router, score = self._router(adapter), self._score(adapter)
        if self._modifiers(adapter).mixes_rows:  # a capacity closes gates by what else is there
            return None
        weights_E = router.fixed_weights()
        if weights_E is not None:
            return weights_E
        rows = self.moelora_input[adapter].fixed_rows(self.shared.call.call)
        if rows is None or score.reads_input or router.reads_input:
            return None
        modules: tuple[nn.Module, ...] = (router, score, self._modifiers(adapter))
        modes = [module.training for module in modules]
        try:
            for module in modules:
                module.eval()  # noise of training has no place in a merge
            routing: Routing = router(rows, score, self._modifiers(adapter))
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.train(mode)
        return routing.weights[0]

    def experts_decided_about(self, adapter: str = "default") -> int:
        """E of this layer's own router."""
        return self._router(adapter).plan.num_experts

    def router_weights(self, adapter: str = "default") -> Tensor:
        """The gate (E, in): a writable view without gradient.

        Raises:
            ConfigError: this adapter's score is no such matrix.
        """
        weight = getattr(self.moelora_gate[adapter], "weight", None)
        if not isinstance(weight, Tensor):
            raise ConfigError(
                f"{type(self.moelora_gate[adapter]).__name__} has no gate matrix; read its own "
                "parameters from moelora_gate."
            )
        return weight.detach()

    def gate_parameters(self) -> list[nn.Parameter]:
        """The routers' trainable parameters."""
        modules = (*self.moelora_gate.values(), *self.moelora_router.values())
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What trains of all adapters here."""
        return [
            parameter
            for name, parameter in self.named_parameters()
            if name.startswith("moelora_") and parameter.requires_grad
        ]

    def _router(self, adapter: str) -> Router:
        return cast(Router, self.part("moelora_router", adapter))

    def _score(self, adapter: str) -> Score:
        return cast(Score, self.part("moelora_gate", adapter))

    def _modifiers(self, adapter: str) -> RouterModifiers:
        return cast(RouterModifiers, self.part("moelora_modifiers", adapter))


def _refuse_buffers(part: nn.Module) -> None:
    """A part's state has to travel wherever an adapter is copied, which buffers do not."""
    buffers = sorted({*part.state_dict()} - {name for name, _ in part.named_parameters()})
    if buffers:
        raise ConfigError(
            f"{type(part).__name__} keeps {buffers[0]!r} as a buffer, which copies of an adapter "
            "lose; add it by register_frozen."
        )
