"""The calls of one model that are going on.

Shape suffixes: B sequences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..per_thread import PerThread
from .generation import Generation
from .reading import (
    as_ids,
    cache_among,
    cache_of_output,
    is_cache,
    memories,
    named_arguments,
    prompt_before,
    read_call,
)
from .view import Call, Kept

# Arguments of a model's call that are ours: ids of each sequence (B,), taken out before the model
# sees them. Singular, because PEFT's own forward swallows one called `task_ids`.
ROUTING_IDS = ("task_id", "cluster_id")


@dataclass(frozen=True)
class Part:
    """A part of a model that sees tokens of its own, or is called by itself.

    Attributes:
        name: its name in the model.
        is_text: whether its tokens are those of the model's call (the language model behind a
            tower of images), of which the model's own arguments say more.
        is_decoder: whether the call's labels are its next tokens.
    """

    name: str | None
    is_text: bool = False
    is_decoder: bool = False


# The model itself.
_MODEL = Part(None, is_text=True)


@dataclass(frozen=True)
class _PartHooks:
    """Hooks on one part; an object of its own, since a copy of the model must find its context."""

    context: CallContext
    part: Part

    def begin(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Before the part's forward."""
        return self.context._begin_part(self.part, module, args, kwargs)

    def end(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """After it."""
        self.context._end(module, args, kwargs, output, self.part)


class CallContext:
    """Shared by all adapted layers of one model.

    A recomputation under activation checkpointing runs in the backward, when the model's forward
    has returned and others may have followed it (a reference model's, an evaluation's, the other
    half of a contrastive loss). So the outputs of a call that has a graph carry a hook that says,
    when the backward comes by, whose layers will be recomputed next.

    Threads that call the model at once each have calls of their own.

    Attributes:
        ids: ids for calls that do not bring their own, by name; see `routing_ids`.
        before_call: run before each training call, with the call: for state that must not change
            between a forward and its recomputation.
    """

    def __init__(self) -> None:
        self.ids: dict[str, Tensor] = {}
        self.before_call: list[Callable[[Call], None]] = []
        self._watched: dict[str | None, Part] = {}
        self._has_memories = False
        self._forget()

    def _forget(self) -> None:
        self._ongoing: PerThread[list[Call]] = PerThread(list)
        self._began: PerThread[list[str | None]] = PerThread(list)
        self._generations: PerThread[list[Generation]] = PerThread(list)
        # The call whose backward is running, or the last one with a graph.
        self._differentiated = Call()
        # What was kept from the call that began a cache.
        self._kept: WeakKeyDictionary[Any, Kept] = WeakKeyDictionary()

    @property
    def _calls(self) -> list[Call]:
        """The calls that are going on, the innermost last."""
        return self._ongoing.get()

    @property
    def _begun_by(self) -> list[str | None]:
        """Who began each of them: a part's name, or None for the model."""
        return self._began.get()

    @property
    def generations(self) -> list[Generation]:
        """The generations that are going on, the innermost last."""
        return self._generations.get()

    @property
    def call(self) -> Call:
        """The call that is going on, or the one that is being recomputed."""
        if calls := self._calls:
            return calls[-1]
        if torch._C._current_graph_task_id() != -1:  # inside a backward
            return self._differentiated
        # A layer is called, or merged, by itself.
        return Call(ids=self.ids)

    def watch(
        self, model: nn.Module, parts: Sequence[Part] = (), has_memories: bool = False
    ) -> None:
        """Learn from each call of `model` and of its parts; a second time does nothing.

        Args:
            model: the adapted model.
            parts: those of its parts whose calls say something.
            has_memories: whether its text decoder may read states of other parts.
        """
        self._has_memories = self._has_memories or has_memories
        if None not in self._watched:
            self._watched[None] = _MODEL
            model.register_forward_pre_hook(self._begin, with_kwargs=True)
            model.register_forward_hook(self._end, with_kwargs=True, always_call=True)
        for part in parts:
            if part.name is not None and part.name not in self._watched:
                self._watched[part.name] = part
                module, hooks = model.get_submodule(part.name), _PartHooks(self, part)
                module.register_forward_pre_hook(hooks.begin, with_kwargs=True)
                module.register_forward_hook(hooks.end, with_kwargs=True, always_call=True)

    def unwatch(self, model: nn.Module) -> None:
        """Take the hooks out. By owner, since a copy of the model has no handles of its own."""
        self._watched.clear()
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [k for k, hook in hooks.items() if self._owns(hook)]:
                    del hooks[key]

    @contextmanager
    def of_rows(self, index: Sequence[int]) -> Iterator[None]:
        """Inside, the call that is going on is that of some of its sequences; see `Call.rows`."""
        self._calls.append(self.call.rows(index))
        try:
            yield
        finally:
            self._calls.pop()

    @property
    def decoder(self) -> str | None:
        """The part whose tokens the model's outputs are of; None where they are the model's own."""
        return next((name for name, part in self._watched.items() if part.is_decoder), None)

    def _owns(self, hook: Any) -> bool:
        owner = getattr(hook, "__self__", None)
        return owner is self or (isinstance(owner, _PartHooks) and owner.context is self)

    def _begin(
        self,
        module: nn.Module,
        args: Any,
        kwargs: dict[str, Any],
        part: Part = _MODEL,
    ) -> tuple[Any, dict[str, Any]]:
        given = {name: kwargs[name] for name in ROUTING_IDS if kwargs.get(name) is not None}
        kwargs = {name: value for name, value in kwargs.items() if name not in ROUTING_IDS}
        call = read_call(module, args, kwargs, self.ids, given)
        if self.generations and part.is_text and self.decoder is None and call.shape is not None:
            call = replace(call, ends=self.generations[-1].end_of(call.shape[1]))
        if self._kept:
            cache = cache_among(named_arguments(module, args, kwargs))
            if is_cache(cache) and (kept := self._kept.get(cache)) is not None:
                call = replace(call, kept=kept)
        self._calls.append(call)
        self._begun_by.append(part.name)
        if torch.is_grad_enabled():
            self._differentiated = call
        if call.is_training:
            for function in self.before_call:
                function(call)
        return args, kwargs

    def _end(
        self,
        module: nn.Module,
        args: Any,
        kwargs: dict[str, Any],
        output: Any,
        part: Part = _MODEL,
    ) -> None:
        if not self._calls or self._begun_by[-1] != part.name:
            return  # a part within the call; or another hook raised before ours had begun
        call = self._calls.pop()
        self._begun_by.pop()
        if call.kept:
            cache = cache_among(named_arguments(module, args, kwargs))
            cache = cache_of_output(output) if cache is None else cache
            if is_cache(cache):
                self._kept[cache] = call.kept
        # A compiled graph is not recomputed by us, and cannot take hooks.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for tensor in _tensors(output):
                if tensor.grad_fn is not None:
                    tensor.register_hook(functools.partial(self._differentiate, call))

    def _begin_part(
        self, part: Part, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """A part's call within the model's says what its tokens are; by itself it is the call."""
        if not self._calls:
            args, kwargs = self._begin(module, args, kwargs, part)
            if not part.is_text and part.name:
                self._calls[-1].streams[part.name] = self._calls[-1]
            return args, kwargs
        call = self._calls[-1]
        if not part.is_text and part.name:
            call.streams[part.name] = self._stream(part, module, args, kwargs, call)
        elif self._has_memories and call.shape is not None:
            call.memories.extend(memories(named_arguments(module, args, kwargs)))
        return None

    def _stream(
        self, part: Part, module: nn.Module, args: Any, kwargs: dict[str, Any], whole: Call
    ) -> Call:
        """The call of a part with tokens of its own, within the model's call."""
        call = read_call(module, args, kwargs, {})
        labels, prompt_BS, ends = whole.labels, None, None
        if labels is not None and call.shape is not None:
            if part.is_decoder:
                prompt_BS = prompt_before(labels, call.shape, call.real_BS, None, True)
            else:  # whatever has no labels of its own is part of the question
                everything_BS = torch.ones(call.shape, dtype=torch.bool, device=labels.device)
                prompt_BS = everything_BS if call.real_BS is None else call.real_BS
        if part.is_decoder and self.generations and call.shape is not None:
            ends = self.generations[-1].end_of(call.shape[1])
        return replace(
            call,
            prompt_BS=prompt_BS,
            ends=ends,
            ids=whole.ids,
            is_training=whole.is_training,
            kept=whole.kept,
        )

    def _differentiate(self, call: Call, grad: Tensor) -> None:
        self._differentiated = call

    def __getstate__(self) -> dict[str, Any]:
        """A copy knows the model's hooks and defaults, and no call."""
        names = ("ids", "before_call", "_watched", "_has_memories")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def contexts_of(model: nn.Module) -> list[CallContext]:
    """What the layers of a model share, one for each adapted model inside it."""
    found = (getattr(getattr(module, "shared", None), "call", None) for module in model.modules())
    return list({id(call): call for call in found if isinstance(call, CallContext)}.values())


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
    contexts = contexts_of(model)
    if not contexts:
        raise ConfigError(
            f"routing_ids needs a model with MoE-LoRA layers, and this {type(model).__name__} has "
            "none; pass the model that the adapter was added to."
        )
    given = {"task_id": task_id, "cluster_id": cluster_id}
    ids = {name: as_ids(name, value) for name, value in given.items() if value is not None}
    before = [context.ids for context in contexts]
    for context in contexts:
        context.ids = {**context.ids, **ids}
    try:
        yield
    finally:
        for context, known in zip(contexts, before, strict=True):
            context.ids = known


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)
