"""What the adapted layers of one model know about the call they are part of.

A linear in the middle of a network sees its own input only. Which tokens are padding, which belong
to the prompt, whether a cache holds the past and which task a sequence belongs to are read from the
arguments of the model's call, by hooks on the model.

Shape suffixes: B sequences, S positions, T tokens (B times S).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .errors import ConfigError

# Arguments of a model's call that are ours: ids of each sequence (B,), taken out before the model
# sees them. Singular, because PEFT's own forward swallows one called `task_ids`.
ROUTING_IDS = ("task_id", "cluster_id")

# What a decision about a whole sequence is kept as, by the router input that took it.
Kept = dict[Any, Tensor]


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the model.

    Attributes:
        shape: (B, S) of the model's input; None where its arguments do not tell.
        real_BS: True where a position is not padding; None where no mask says so.
        prompt_BS: True where a position is real and before the sequence's first label that counts,
            so before the answer; None without labels.
        past: how many positions a cache holds already: 0 at the first call of a generation. A
            tensor where the cache counts on the device; None where the cache does not tell.
        ids: by name in `ROUTING_IDS`, the sequences' ids (B,), or () for one id that all share.
        is_training: whether the model was in training mode and gradients were on.
        kept: what router inputs keep from the first call of a generation for the later ones.
    """

    shape: tuple[int, int] | None = None
    real_BS: Tensor | None = None
    prompt_BS: Tensor | None = None
    past: int | Tensor | None = 0
    ids: Mapping[str, Tensor] = field(default_factory=dict)
    is_training: bool = False
    kept: Kept = field(default_factory=dict)
    _of_rows: dict[tuple[int, ...], Call] = field(default_factory=dict, init=False, repr=False)

    def rows(self, index: Sequence[int]) -> Call:
        """The same call as seen by a layer that gets only some of its sequences.

        The same sequences give the same object, so that layers can tell that they are in one call.
        What is kept for later calls of a generation is shared: an adapter that gets these
        sequences at the first call gets them at all.

        Args:
            index: which sequences, in their order.
        """
        key = tuple(index)
        if key not in self._of_rows:
            self._of_rows[key] = self._narrowed(list(key))
        return self._of_rows[key]

    def _narrowed(self, index: list[int]) -> Call:
        def chosen(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[index]

        return replace(
            self,
            shape=None if self.shape is None else (len(index), self.shape[1]),
            real_BS=chosen(self.real_BS),
            prompt_BS=chosen(self.prompt_BS),
            ids={name: ids[index] if ids.ndim else ids for name, ids in self.ids.items()},
        )

    @property
    def begins(self) -> bool | None:
        """Whether no cache holds a past; None where the cache does not tell."""
        return None if self.past is None else not bool(self.past > 0)

    @property
    def real_T(self) -> Tensor | None:
        """`real_BS` by token."""
        return None if self.real_BS is None else self.real_BS.flatten()

    @functools.cached_property
    def unmasked(self) -> Call:
        """The same for a layer that sees an image's tokens, none of which is padding or prompt."""
        return replace(self, real_BS=None, prompt_BS=None)

    def real_among(self, tokens: int) -> Tensor | None:
        """`real_T` for a layer that sees so many tokens.

        Layers that see other tokens (a pooled sequence) have no mask: None.
        """
        real_T = self.real_T
        return real_T if real_T is not None and real_T.shape[0] == tokens else None


class CallContext:
    """Shared by all adapted layers of one model.

    A recomputation under activation checkpointing runs in the backward, when the model's forward
    has returned and others may have followed it (a reference model's, an evaluation's, the other
    half of a contrastive loss). So the outputs of a call that has a graph carry a hook that says,
    when the backward comes by, whose layers will be recomputed next.

    Attributes:
        ids: ids for calls that do not bring their own, by name; see `routing_ids`.
        before_call: run before each training call, with the call: for state that must not change
            between a forward and its recomputation.
    """

    def __init__(self) -> None:
        self.ids: dict[str, Tensor] = {}
        self.before_call: list[Callable[[Call], None]] = []
        self._is_watching = False
        self._forget()

    def _forget(self) -> None:
        # Calls that are going on, the innermost last.
        self._calls: list[Call] = []
        # The call whose backward is running, or the last one with a graph.
        self._differentiated = Call()
        # What was kept from the call that began a cache.
        self._kept: WeakKeyDictionary[Any, Kept] = WeakKeyDictionary()

    @property
    def call(self) -> Call:
        """The call that is going on, or the one that is being recomputed."""
        if self._calls:
            return self._calls[-1]
        if torch._C._current_graph_task_id() != -1:  # inside a backward
            return self._differentiated
        # A layer is called, or merged, by itself.
        return Call(ids=self.ids)

    def watch(self, model: nn.Module) -> None:
        """Learn from each call of `model`; a second time does nothing."""
        if not self._is_watching:
            self._is_watching = True
            model.register_forward_pre_hook(self._begin, with_kwargs=True)
            model.register_forward_hook(self._end, with_kwargs=True, always_call=True)

    def _begin(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        given = {name: kwargs[name] for name in ROUTING_IDS if kwargs.get(name) is not None}
        kwargs = {name: value for name, value in kwargs.items() if name not in ROUTING_IDS}
        call = read_call(module, args, kwargs, self.ids, given)
        cache = kwargs.get("past_key_values")
        if self._kept and cache is not None and cache in self._kept:
            call = replace(call, kept=self._kept[cache])
        self._calls.append(call)
        if torch.is_grad_enabled():
            self._differentiated = call
        if call.is_training:
            for function in self.before_call:
                function(call)
        return args, kwargs

    def _end(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not self._calls:  # another hook raised before ours had begun
            return
        call = self._calls.pop()
        if call.kept and (cache := _cache_of(kwargs, output)) is not None:
            self._kept[cache] = call.kept
        # A compiled graph is not recomputed by us, and cannot take hooks.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for tensor in _tensors(output):
                if tensor.grad_fn is not None:
                    tensor.register_hook(functools.partial(self._differentiate, call))

    def _differentiate(self, call: Call, grad: Tensor) -> None:
        self._differentiated = call

    def __getstate__(self) -> dict[str, Any]:
        """A copy knows the model's hooks and defaults, and no call."""
        return {"ids": self.ids, "before_call": self.before_call, "watching": self._is_watching}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.ids, self.before_call = state["ids"], state["before_call"]
        self._is_watching = state["watching"]
        self._forget()


@contextmanager
def routing_ids(
    model: nn.Module,
    *,
    task_id: int | Sequence[int] | Tensor | None = None,
    cluster_id: int | Sequence[int] | Tensor | None = None,
) -> Iterator[None]:
    """Say which task or cluster the sequences belong to, in all calls of `model` inside the block.

        with routing_ids(model, task_id=2):
            model.generate(**inputs)

    A training call may bring the ids as arguments of its own, `model(**batch, task_id=ids)`, which
    win; `generate` refuses arguments that its model does not name, and merging has no call.

    Args:
        model: a model with MoE-LoRA layers, wrapped or not.
        task_id: one id for all sequences, or one per sequence (B,); where `generate` makes several
            rows of a sequence (beams, several answers), each has its sequence's id.
        cluster_id: likewise.

    Raises:
        ConfigError: the model has no MoE-LoRA layers, or an id is no integer of at least 0.
    """
    found = (getattr(getattr(module, "shared", None), "call", None) for module in model.modules())
    contexts = {id(call): call for call in found if isinstance(call, CallContext)}
    if not contexts:
        raise ConfigError(
            f"routing_ids needs a model with MoE-LoRA layers, and this {type(model).__name__} has "
            "none; pass the model that the adapter was added to."
        )
    given = {"task_id": task_id, "cluster_id": cluster_id}
    ids = {name: _as_ids(name, value) for name, value in given.items() if value is not None}
    before = {key: context.ids for key, context in contexts.items()}
    for context in contexts.values():
        context.ids = {**context.ids, **ids}
    try:
        yield
    finally:
        for key, context in contexts.items():
            context.ids = before[key]


def read_call(
    module: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any],
    defaults: Mapping[str, Any],
    given: Mapping[str, Any] | None = None,
) -> Call:
    """What the arguments of a call of `module` say, found by name.

    Args:
        module: the model.
        args: its positional arguments.
        kwargs: its other arguments. With a cache the attention mask covers the past as well: its
            last columns are the current positions.
        defaults: ids where the call brings none; rows that `generate` made of one sequence are
            next to each other and share its id.
        given: ids that came with the call, one per row.

    Raises:
        ConfigError: the ids' number is not that of the sequences.
    """
    arguments = kwargs
    if args:
        names = inspect.signature(module.forward).parameters
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    shape, past = _shape(arguments), _past(arguments)
    real_BS = _real(arguments, shape, past)
    if shape is None and real_BS is not None:
        shape = (real_BS.shape[0], real_BS.shape[1])
    ids = {name: _expanded(name, value, shape) for name, value in defaults.items()}
    for name, value in (given or {}).items():
        ids[name] = _checked(name, _as_ids(name, value), shape)
    labels = arguments.get("labels")
    prompt_BS = None
    if isinstance(labels, Tensor) and shape is not None:
        prompt_BS = _prompt(labels, shape, real_BS)
    is_training = module.training and torch.is_grad_enabled()
    return Call(shape, real_BS, prompt_BS, past, ids, is_training)


def _shape(arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    for name in ("input_ids", "inputs_embeds"):
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.ndim > 1:
            return value.shape[0], value.shape[1]
    return None


def _real(
    arguments: Mapping[str, Any], shape: tuple[int, int] | None, past: int | Tensor | None
) -> Tensor | None:
    mask = arguments.get("attention_mask")
    if isinstance(mask, dict):  # one per kind of attention layer
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 2:
        length = mask.shape[1] if shape is None else shape[1]
        start = mask.shape[1] - length
        return None if start < 0 else mask[:, start:].bool()
    cached = arguments.get("past_key_values") is not None
    if mask.ndim == 4 and shape is not None and past is not None and cached:
        # For a cache that can be compiled, `generate` makes the finished mask (B, 1, S, all). A
        # position is real where it may attend to itself.
        positions_S = torch.arange(shape[1], device=mask.device)
        own_BS = mask[:, 0, positions_S, positions_S + past]
        return own_BS == 0 if own_BS.is_floating_point() else own_BS.bool()
    return None


def _prompt(labels: Tensor, shape: tuple[int, int], real_BS: Tensor | None) -> Tensor:
    if labels.shape == shape:
        prompt_BS = (labels != -100).cumsum(1) == 0
    else:  # a label per sequence, or another sequence's: all that is read is the question
        prompt_BS = torch.ones(shape, dtype=torch.bool, device=labels.device)
    return prompt_BS if real_BS is None else prompt_BS & real_BS


def _past(arguments: Mapping[str, Any]) -> int | Tensor | None:
    cache = arguments.get("past_key_values")
    if cache is None:
        return 0
    length_of = getattr(cache, "get_seq_length", None)
    if not callable(length_of):
        return None
    length: int | Tensor = length_of()
    # A static cache hands out its own counter, which the first attention layer moves on.
    return length.clone() if isinstance(length, Tensor) else length


def _as_ids(name: str, value: Any) -> Tensor:
    ids = torch.as_tensor(value)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.ndim > 1:
        raise ConfigError(
            f"{name} must be one integer or one integer per sequence, got "
            f"{ids.dtype} of shape {tuple(ids.shape)}."
        )
    return ids.long()


def _expanded(name: str, ids: Tensor, shape: tuple[int, int] | None) -> Tensor:
    """One id per row, where each sequence has become several rows in a row."""
    if ids.ndim and shape is not None and len(ids) and shape[0] % len(ids) == 0:
        ids = ids.repeat_interleave(shape[0] // len(ids))
    return _checked(name, ids, shape)


def _checked(name: str, ids: Tensor, shape: tuple[int, int] | None) -> Tensor:
    if ids.ndim and shape is not None and len(ids) != shape[0]:
        raise ConfigError(
            f"{name} has {len(ids)} ids for {shape[0]} sequences; give one per sequence, or one "
            "integer for all."
        )
    return ids


def _cache_of(kwargs: Mapping[str, Any], output: Any) -> Any:
    """The cache that a call wrote to: the one it was given, or the one it made."""
    made = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
    caches = (kwargs.get("past_key_values"), *made)
    return next((cache for cache in caches if hasattr(cache, "get_seq_length")), None)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)
