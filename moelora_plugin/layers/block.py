"""A feed-forward block in which every expert is the whole block with LoRA of its own.

Shape suffixes: T tokens, E experts, K selected experts, H features, O out; P rows, each a token for
one of its experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from ..config import MoeLoraConfig
from ..errors import ConfigError, ExportError
from ..ops.gated_rows import gate_rows, restore_gradient
from ..per_thread import PerThread, nothing
from ..types import GateRescale, GateRescaleScope, LayerPlan, Routing
from .folding import FoldingLinear
from .gate_source import GateSource
from .linear import MoeLoraLinear
from .mixed import by_adapter
from .routed import RoutedLayer, Shared

# The child of the feed-forward module that holds its router.
BLOCK = "moelora_block"


@dataclass(frozen=True)
class Dispatch:
    """Which experts run on which tokens.

    Attributes:
        tokens_P: the token of each row.
        gates_P: its gate, with its graph.
        one_hot_PE: 1 at the expert that runs on it.
        num_tokens: T.
        per_token: K where every token has K rows, one after the other; None where that depends on
            the token.
    """

    tokens_P: Tensor
    gates_P: Tensor
    one_hot_PE: Tensor
    num_tokens: int
    per_token: int | None

    @classmethod
    def of(cls, routing: Routing) -> Dispatch:
        """From a decision: K rows for every token where it has `expert_ids`, else one per gate.

        With K rows nothing depends on the data: no accelerator waits, and the block compiles. A
        row whose gate a capacity took away then runs in vain, and counts for nothing.
        """
        weights_TE, ids_TK = routing.weights, routing.expert_ids
        tokens = len(weights_TE)
        if ids_TK is None:
            # NaN is not zero: a broken decision shows in its token.
            tokens_P, experts_P = weights_TE.detach().nonzero(as_tuple=True)
            gates_P = weights_TE[tokens_P, experts_P]
        else:
            tokens_P = torch.arange(tokens, device=ids_TK.device).repeat_interleave(
                ids_TK.shape[-1]
            )
            experts_P = ids_TK.flatten()
            gates_P = weights_TE.gather(-1, ids_TK).flatten()
        one_hot_PE = torch.nn.functional.one_hot(experts_P, weights_TE.shape[-1])
        per_token = None if ids_TK is None else ids_TK.shape[-1]
        return cls(tokens_P, gates_P, one_hot_PE.to(weights_TE.dtype), tokens, per_token)

    def expand(self, x_TH: Tensor) -> Tensor:
        """Each row's token (P, H)."""
        if self.per_token is None:
            return x_TH.index_select(0, self.tokens_P)
        # Not an index_select: the backward of this one is a sum, in the same order every time.
        return x_TH.unsqueeze(1).expand(-1, self.per_token, -1).flatten(0, 1)

    def combine(self, rows_PH: Tensor) -> Tensor:
        """The sum of each token's rows (T, H); zero for a token without any."""
        if self.per_token is None:
            zeros_TH = rows_PH.new_zeros(self.num_tokens, rows_PH.shape[-1])
            return zeros_TH.index_add(0, self.tokens_P, rows_PH)
        return rows_PH.view(self.num_tokens, self.per_token, rows_PH.shape[-1]).sum(1)


@dataclass(frozen=True)
class Pass:
    """One call of the block, from its first hook to its last.

    Attributes:
        adapter: whose router decided.
        routing: what it decided, with its graph.
        dispatch: the same as rows.
        x: the block's input (..., H).
        rows: what its linears get instead (1, P, H).
        rescale: the exponent of the gates in the experts' backward.
        scope: what x receives in the backward.
    """

    adapter: str
    routing: Routing
    dispatch: Dispatch
    x: Tensor
    rows: Tensor
    rescale: GateRescale
    scope: GateRescaleScope


class MoeLoraBlock(RoutedLayer):
    """y = sum_i g_i(x) FFN_i(x)     (MixLoRA, arXiv 2404.15159; LLaVA-MoLE, arXiv 2401.16160).

    FFN_i is the feed-forward module with the i-th LoRA on each of its adapted linears; what is not
    adapted is the same for all. The module stays what and where it is, so that the names of its
    parameters do not change: this one is its child `moelora_block`, and two hooks on it make the
    mixture. The first decides for the tokens of x, and hands the module one row per token and
    selected expert, (1, P, H) in place of (B, S, H); the linears get one-hot gates; the second
    hook multiplies each row by its gate and adds the rows of a token.

    So the module must treat every token by itself, as feed-forward blocks do. The base of a linear
    that reads x itself runs once per token, not once per row, as in MixLoRA's code.

    A token that no expert takes (capacity, or a router that selects none) gets zero: the residual
    alone, as in Switch Transformers (arXiv 2101.03961). MoE-PEFT's `mixlora-switch` differs: such a
    token gets its probability times x, and at inference every token gets x itself.

    With a `gate_rescale`, the linears' A and B see g^p. With scope "weights" x receives the true
    gradient all the same, while biases of the block that train see g^p as well. The gate of an
    expert that does not run receives no gradient (a straight-through router's neither).

    Args:
        shared: what the model's layers share.
        ffn: the feed-forward module; not kept.
        linear: one of its adapted linears: the router goes where its base is.
    """

    adapter_layer_names = RoutedLayer.router_layer_names
    other_param_names = ("moelora_scope", *RoutedLayer.router_param_names)

    def __init__(self, shared: Shared, ffn: nn.Module, linear: MoeLoraLinear) -> None:
        super().__init__(shared)
        self.in_features = _input_features(ffn)
        self._linear = (linear,)  # a tuple, since it is no child
        self.moelora_scope: dict[str, GateRescaleScope] = {}
        self._active_adapter: str | list[str] = []
        self._passes: PerThread[Pass | None] = PerThread(nothing)
        self._handles: tuple[RemovableHandle, ...] = ()

    @classmethod
    def on(cls, ffn: nn.Module, linear: MoeLoraLinear, shared: Shared) -> MoeLoraBlock:
        """The one of this module, made where there is none."""
        block = dict(ffn.named_children()).get(BLOCK)
        if not isinstance(block, MoeLoraBlock):
            block = cls(shared, ffn, linear)
            setattr(ffn, BLOCK, block)
            # Functions, not methods: a copy of the module finds its own child. Hooks that others
            # have registered see x and y, not rows.
            block._handles = (
                ffn.register_forward_pre_hook(_begin, with_kwargs=True),
                ffn.register_forward_hook(_end, prepend=True, always_call=True),
            )
        return block

    def remove_from(self, ffn: nn.Module) -> None:
        """Leave the module as it was."""
        for handle in self._handles:
            handle.remove()
        delattr(ffn, BLOCK)

    def get_base_layer(self) -> nn.Module:
        """A base that PEFT reads device and dtype from."""
        return self._linear[0].get_base_layer()

    def add_adapter(self, adapter: str, config: MoeLoraConfig, plan: LayerPlan) -> None:
        """Create an adapter's router, which is active and trains as the linears' experts.

        Args:
            adapter: its name.
            config: its configuration.
            plan: its experts.
        """
        (linear,) = self._linear
        self.add_router(adapter, config, plan, self.in_features)
        self.set_gate_rescale(adapter, config)
        self.moelora_scope[adapter] = cast(GateRescaleScope, config.gate_rescale_scope)
        self.place_router(adapter, next(iter(linear.tensors(adapter).values())))
        self._active_adapter = list(linear.active_adapters)
        self._disable_adapters = linear.disable_adapters
        trains = adapter in self.active_adapters and not config.inference_mode
        for name in self.router_layer_names:
            getattr(self, name)[adapter].requires_grad_(trains)
        self.train(linear.training)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter; which one is active then is the model's business."""
        for name in (*self.adapter_layer_names, *self.other_param_names):
            if adapter_name in getattr(self, name):
                del getattr(self, name)[adapter_name]

    def begin(self, x: Tensor) -> Tensor:
        """Decide for the tokens of x (..., H): the rows (1, P, H) for the linears."""
        self._passes.set(None)
        mixed = self.shared.mixed
        active: list[str] = self.active_adapters
        if mixed is not None:
            active = [] if mixed.only is None else [mixed.only]
        adapters = [a for a in active if a in self.moelora_router]
        if self.disable_adapters or not adapters:
            return x
        adapter = adapters[0]
        if x.shape[-1] != self.in_features:
            raise ConfigError(
                f"A block with site 'block' got {x.shape[-1]} features, but its first linear reads "
                f"{self.in_features}; name another module by site_kwargs={{'block': ...}}."
            )
        router = next(self.moelora_gate[adapter].parameters(), x)
        routing = self.route(self._cast_input_dtype(x, router.dtype), adapter)
        dispatch = Dispatch.of(routing)
        rescale, scope = self.moelora_gate_rescale[adapter], self.moelora_scope[adapter]
        rows_PH = dispatch.expand(x.reshape(-1, self.in_features))
        if scope == "weights":
            rows_PH = restore_gradient(rows_PH, dispatch.gates_P, rescale)
        rows = rows_PH.unsqueeze(0)
        self._passes.set(Pass(adapter, routing, dispatch, x, rows, rescale, scope))
        return rows

    def end(self, output: Any) -> Any:
        """Mix what the module made of the rows; nothing where it failed or had no rows."""
        current = self._passes.get()
        self._passes.set(None)
        if current is None or output is None:
            return None
        if not isinstance(output, Tensor):
            raise ConfigError(
                "A feed-forward block with site 'block' must return one tensor, got "
                f"{type(output).__name__}; name another module by site_kwargs={{'block': ...}}."
            )
        dispatch = current.dispatch
        rows_PH = output.reshape(-1, output.shape[-1])
        mixed_TH = dispatch.combine(gate_rows(rows_PH, dispatch.gates_P, current.rescale))
        if self.moelora_aux_losses[current.adapter]:
            # No experts for the losses: they are spread over the block's linears.
            loss_input = self.loss_input(current.routing, current.x)
            mixed_TH = self.enter_losses(mixed_TH, loss_input, current.adapter)
        return mixed_TH.view(*current.x.shape[:-1], output.shape[-1])

    def pass_of(self, linear: MoeLoraLinear, adapter: str) -> Pass:
        """The call that is going on, as one of the block's linears needs it.

        Raises:
            ConfigError: there is none, or several adapters are active.
        """
        active = [a for a in linear.active_adapters if a in linear.moelora_mixture]
        if len(active) > 1 and self.shared.mixed is None:
            raise ConfigError(
                f"Adapter {adapter!r} has site 'block' and cannot be active together with another "
                f"on the same linear, but {active} are; activate one with set_adapter."
            )
        current = self._passes.get()
        if current is None:
            raise ConfigError(
                f"A linear of adapter {adapter!r} was called outside of its feed-forward block, "
                "which alone can route with site 'block'; call the block, or set site to 'linear'."
            )
        return current

    def chosen(self, adapter: str) -> Tensor | None:
        """The gates (E,) where one expert alone is always on, with gate 1; else None."""
        weights_E = self.fixed_weights(adapter)
        if weights_E is None or weights_E.count_nonzero() != 1 or weights_E.max() != 1:
            return None
        return weights_E

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: where a merge is possible at all, the linears do it."""

    def unmerge(self) -> None:
        """Nothing."""


@dataclass
class BlockGates(GateSource):
    """Gates of a linear in a block.

    Attributes:
        block: where they come from.
    """

    experts_per_row = 1.0

    block: MoeLoraBlock

    def gates(self, linear: MoeLoraLinear, adapter: str, x: Tensor) -> Tensor:
        """One-hot: each row belongs to one expert."""
        one_hot_PE = self.block.pass_of(linear, adapter).dispatch.one_hot_PE
        rows = x.numel() // max(x.shape[-1], 1)
        if rows != len(one_hot_PE):
            raise ConfigError(
                f"A linear of a block with site 'block' got {rows} tokens, but its block handed "
                f"out {len(one_hot_PE)}; it mixes tokens or routes them itself, so set site to "
                "'linear' or leave it out of target_modules."
            )
        return one_hot_PE

    def base_output(self, linear: MoeLoraLinear, x: Tensor) -> Tensor | None:
        """The base on every token once, where the linear reads the block's input as it is."""
        current = self.block._passes.get()
        if current is None or x is not current.rows or current.rows.numel() <= current.x.numel():
            return None
        base: Tensor = linear.base_layer(current.x)
        rows_PO = current.dispatch.expand(base.reshape(-1, base.shape[-1]))
        if current.scope == "weights":
            rows_PO = restore_gradient(rows_PO, current.dispatch.gates_P, current.rescale)
        return rows_PO.unsqueeze(0)

    def forget(self, linear: MoeLoraLinear, adapter: str) -> None:
        """PEFT, which passes over modules inside others of ours, leaves the block to us."""
        self.block.delete_adapter(adapter)
        self.block.set_adapter(linear.active_adapters)

    def fixed_weights(self, linear: FoldingLinear, adapter: str) -> Tensor | None:
        """See `MoeLoraBlock.chosen`.

        Raises:
            ExportError: there is more than one expert to mix.
        """
        weights_E = self.block.chosen(adapter)
        if weights_E is None:
            raise ExportError(
                "With site 'block' the experts are whole feed-forward blocks, which do not fold "
                "into one; serve the adapter unmerged."
            )
        return weights_E

    def mean_weights(
        self, linear: FoldingLinear, adapter: str, mean_of: Callable[[RoutedLayer], Tensor]
    ) -> Tensor:
        """The fixed ones: a mean of blocks is no block."""
        return cast(Tensor, self.fixed_weights(linear, adapter))


def blocks_of(model: nn.Module) -> list[tuple[nn.Module, MoeLoraBlock]]:
    """Every feed-forward module that is a block, with its `MoeLoraBlock`."""
    return [
        (module, child)
        for module in model.modules()
        for child in module.children()
        if isinstance(child, MoeLoraBlock)
    ]


@contextmanager
def blocks_by_adapter(model: nn.Module) -> Iterator[None]:
    """Run each block once for every adapter of a `mixed_batch`, on that adapter's sequences."""
    found = blocks_of(model)
    before = [vars(ffn).get("forward") for ffn, _ in found]
    for ffn, block in found:
        vars(ffn)["forward"] = partial(_forward_by_adapter, ffn, block, ffn.forward)
    try:
        yield
    finally:
        for (ffn, _), forward in zip(found, before, strict=True):
            del ffn.forward
            if forward is not None:  # another library's own
                vars(ffn)["forward"] = forward


def _forward_by_adapter(
    ffn: nn.Module, block: MoeLoraBlock, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Tensor:
    mixed = block.shared.mixed
    if mixed is None:  # the batch is another thread's
        return cast(Tensor, forward(*args, **kwargs))
    key = None if args else next(iter(kwargs))

    def run(x: Tensor) -> Tensor:
        given, named = ((x, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: x})
        output = None
        try:
            given, named = _begin(ffn, given, named)
            output = forward(*given, **named)
        finally:
            mixture = block.end(output)
        return cast(Tensor, output if mixture is None else mixture)

    return by_adapter(mixed, args[0] if key is None else kwargs[key], run)


def _begin(ffn: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Hook: rows in place of tokens."""
    block = cast(MoeLoraBlock, getattr(ffn, BLOCK))
    # The input may come by name.
    key = None if args else next(iter(kwargs))
    x = args[0] if key is None else kwargs[key]
    rows = block.begin(x)
    if rows is x:
        return args, kwargs
    others = [*args[1:], *(value for name, value in kwargs.items() if name != key)]
    if any(isinstance(other, Tensor) for other in others):
        block.end(None)
        raise ConfigError(
            f"{type(ffn).__name__} takes more tensors than its input, so its tokens cannot be "
            "handed out to experts; set site to 'linear'."
        )
    return ((rows, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: rows})


def _end(ffn: nn.Module, args: Any, output: Any) -> Any:
    """Hook: the mixture in place of the rows' outputs."""
    return cast(MoeLoraBlock, getattr(ffn, BLOCK)).end(output)


def _input_features(ffn: nn.Module) -> int:
    """What the first linear of a feed-forward module reads is what the module reads."""
    for module in ffn.modules():
        if isinstance(module, MoeLoraLinear | nn.Linear):
            return module.in_features
        if isinstance(module, Conv1D):
            return int(module.weight.shape[0])
    raise AssertionError("a block has an adapted linear")
