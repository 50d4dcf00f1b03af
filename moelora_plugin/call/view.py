"""One call of the model, as its layers see it.

Shape suffixes: B sequences, S positions, T tokens (B times S), H hidden features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..errors import ConfigError
from ..types import Documents

# What a decision about a whole sequence is kept as, by the router input that took it: the features,
# and how many positions the cache had to hold for them.
Kept = dict[Any, tuple[Tensor, int]]


_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Memory:
    """States of another stream that some layers read: an encoder's, by cross-attention.

    Attributes:
        states_BSH: the states.
        real_BS: True where one is not padding; None where no mask says so.
    """

    states_BSH: Tensor
    real_BS: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the model, or of a part of it that sees tokens of its own.

    Attributes:
        shape: (B, S) of the input; None where the arguments do not tell.
        real_BS: True where a position is not padding; None where no mask says so.
        prompt_BS: True where a position is real and before the sequence's first label that counts,
            so before the answer; None without labels.
        starts_BS: True where a further sequence begins within its row (packing); None where
            nothing says so.
        past: how many positions a cache holds already: 0 at the first call of a generation. A
            tensor where the cache counts on the device; None where the cache does not tell.
        has_past: whether a cache that does not count holds a past; None where it does not tell.
        position: the positions of a call of one token without a cache, where they are given.
        ends: how many positions the prompt of the generation has that this call is part of.
        ids: by name in `ROUTING_IDS`, the sequences' ids (B,), or () for one id that all share.
        is_training: whether the model was in training mode and gradients were on.
        labels: the labels as they came, for a part of the model whose tokens they belong to.
        kept: what router inputs keep from the first call of a generation for the later ones.
        memories: states of other streams that layers of this one read.
        streams: the calls of the model's parts within this one, by the part's name.
    """

    shape: tuple[int, int] | None = None
    real_BS: Tensor | None = None
    prompt_BS: Tensor | None = None
    starts_BS: Tensor | None = None
    past: int | Tensor | None = 0
    has_past: bool | None = None
    position: Tensor | None = None
    ends: int | None = None
    ids: dict[str, Tensor] = field(default_factory=dict)
    is_training: bool = False
    labels: Tensor | None = None
    kept: Kept = field(default_factory=dict)
    memories: list[Memory] = field(default_factory=list)
    streams: dict[str, Call] = field(default_factory=dict)
    _of_rows: dict[tuple[int, ...], Call] = field(default_factory=dict, init=False, repr=False)
    _narrowed_from: tuple[Call, list[int]] | None = field(default=None, repr=False)
    _known: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def _once(self, name: str, function: Callable[[], _T]) -> _T:
        """Worked out once: `functools.cached_property` has a lock, which cannot be traced."""
        if name not in self._known:
            self._known[name] = function()
        return cast("_T", self._known[name])

    @property
    def begins(self) -> bool | None:
        """Whether no cache holds a past; None where that cannot be told."""
        return self._once("begins", self._begins)

    def _begins(self) -> bool | None:
        if self.past is None:
            return None if self.has_past is None else not self.has_past
        if self.position is not None and bool((self.position > 0).all()):
            return None  # a past there is, and no cache that we know
        return self.held == 0

    @property
    def held(self) -> int | None:
        """`past` as a number, for which an accelerator waits once a call."""
        return self._once("held", lambda: None if self.past is None else int(self.past))

    @property
    def real_T(self) -> Tensor | None:
        """`real_BS` by token."""
        return None if self.real_BS is None else self.real_BS.flatten()

    @property
    def documents(self) -> Documents | None:
        """The sequences of packed rows; None where every row is one sequence.

        An accelerator waits once a call. In a compiled graph, whose shapes cannot depend on values,
        packed rows stop the run.
        """
        return self._once("documents", self._documents)

    def _documents(self) -> Documents | None:
        if self.starts_BS is None or self.starts_BS.numel() == 0:
            return None
        if torch.compiler.is_compiling():
            torch._assert_async(
                ~self.starts_BS.any(),
                "A compiled model got several sequences packed into a row, which this adapter's "
                "routing has to tell apart; do not pack, do not compile, or set "
                "router_input='token'.",
            )
            return None
        row_starts_S = torch.arange(self.starts_BS.shape[1], device=self.starts_BS.device) == 0
        of_T = (self.starts_BS | row_starts_S).flatten().cumsum(0) - 1
        count = int(of_T[-1]) + 1
        return None if count == len(self.starts_BS) else Documents(count, of_T)

    def parts_of(self, shape: Sequence[int]) -> Documents | None:
        """The sequences to count within, for routers that look at several tokens at once.

        Those of packed rows; and in a generation the prompt, after which every token is one of its
        own, as it is where a cache shows one token at a time.

        Args:
            shape: (B, S) or (T,) of a layer's tokens.

        Raises:
            ConfigError: a generation's prompt is not seen as a whole.
        """
        if self.shape is None or math.prod(shape) != math.prod(self.shape):
            return None
        positions = self.shape[1]
        if self.ends is None or positions == self.ends:
            return self.documents
        held = self.held
        if held is None or (held < self.ends and (held > 0 or positions < self.ends)):
            raise ConfigError(
                "A capacity or expert choice counts within the whole prompt, and the model was "
                f"shown {positions} of its {self.ends} tokens; set prefill_chunk_size to None."
            )
        if positions == 1:
            return None
        index_S = torch.arange(positions, device=self._device())
        answers_BS = ((index_S >= self.ends - held) & (index_S > 0)).expand(self.shape)
        starts_BS = answers_BS if self.starts_BS is None else self.starts_BS | answers_BS
        return replace(self, starts_BS=starts_BS).documents

    def _device(self) -> torch.device:
        known = (self.real_BS, self.starts_BS, self.past)
        return next((t.device for t in known if isinstance(t, Tensor)), torch.device("cpu"))

    @property
    def unmasked(self) -> Call:
        """The same for a layer of whose tokens nothing is known: none is padding or prompt."""
        return self._once("unmasked", self._unmasked)

    def _unmasked(self) -> Call:
        return replace(
            self,
            real_BS=None,
            prompt_BS=None,
            starts_BS=None,
            ends=None,
            memories=[],
            streams={},
            _narrowed_from=None,
        )

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
            starts_BS=chosen(self.starts_BS),
            ids={name: ids[index] if ids.ndim else ids for name, ids in self.ids.items()},
            _narrowed_from=(self, index),
        )

    def seen_by(self, stream: str | None, x: Tensor) -> Call:
        """What this call says about the tokens of one layer.

        Args:
            stream: the part of the model whose tokens the layer sees; None for the model's own, ""
                for tokens that no part's arguments describe.
            x: the layer's input (..., in).
        """
        call = self if stream is None else self._stream(stream) or self.unmasked
        return call._about(x) if call._all_memories() else call

    def _stream(self, name: str) -> Call | None:
        if self._narrowed_from is None:
            return self.streams.get(name)
        whole, index = self._narrowed_from
        found = whole._stream(name)
        return None if found is None else found.rows(index)

    def _all_memories(self) -> list[Memory]:
        if self._narrowed_from is None:
            return self.memories
        whole, index = self._narrowed_from
        return [
            Memory(m.states_BSH[index], None if m.real_BS is None else m.real_BS[index])
            for m in whole._all_memories()
        ]

    def is_memory(self, stream: str | None, x: Tensor) -> bool:
        """Whether x is what a layer of this stream reads of another."""
        call = self if stream is None else self._stream(stream)
        return call is not None and any(
            x is memory.states_BSH
            or (
                x.shape == memory.states_BSH.shape and torch.equal(x, memory.states_BSH.to(x.dtype))
            )
            for memory in call._all_memories()
        )

    def _about(self, x: Tensor) -> Call:
        """The call, or the memory's where x is one."""
        for memory in self._all_memories():
            states_BSH = memory.states_BSH
            if x is states_BSH:
                return self._of_memory(memory)
            if x.shape != states_BSH.shape:
                continue
            if x.shape[:-1] != self.shape:
                return self._of_memory(memory)
            # As many tokens in both streams: the values tell, without waiting for an accelerator.
            is_memory = (x == states_BSH.to(x.dtype)).all()
            other, whole = self._of_memory(memory), torch.ones(self.shape, dtype=torch.bool)
            whole = whole.to(x.device)

            def chosen(
                theirs: Tensor | None,
                ours: Tensor | None,
                is_memory: Tensor = is_memory,
                whole: Tensor = whole,
            ) -> Tensor | None:
                if theirs is None and ours is None:
                    return None
                theirs, ours = (whole if mask is None else mask for mask in (theirs, ours))
                return torch.where(is_memory, theirs.to(x.device), ours.to(x.device))

            prompt_BS = self.prompt_BS
            if prompt_BS is not None:
                prompt_BS = chosen(other.prompt_BS, prompt_BS)
            return replace(self, real_BS=chosen(other.real_BS, self.real_BS), prompt_BS=prompt_BS)
        return self

    def _of_memory(self, memory: Memory) -> Call:
        """All real states of a memory are the prompt."""
        real_BS, states_BSH = memory.real_BS, memory.states_BSH
        everything_BS = torch.ones(states_BSH.shape[:2], dtype=torch.bool, device=states_BSH.device)
        return replace(
            self.unmasked,
            shape=(states_BSH.shape[0], states_BSH.shape[1]),
            real_BS=real_BS,
            prompt_BS=everything_BS if real_BS is None else real_BS,
        )

    def real_among(self, shape: Sequence[int]) -> Tensor | None:
        """`real_T` for a layer that sees tokens of this shape: (B, S), or (T,).

        Layers that see other tokens (a pooled sequence) have no mask: None.
        """
        if self.real_BS is None:
            return None
        if len(shape) == 2:
            return self.real_T if tuple(shape) == tuple(self.real_BS.shape) else None
        tokens = 1
        for size in shape:
            tokens *= size
        return self.real_T if self.real_BS.numel() == tokens else None


def running(values_BS: Tensor, starts_BS: Tensor | None) -> Tensor:
    """How many are True up to each position, itself included, from the start of its sequence on."""
    counts_BS = values_BS.long().cumsum(1)
    if starts_BS is None:
        return counts_BS
    before_BS = torch.where(starts_BS, counts_BS - values_BS.long(), 0).cummax(1).values
    return counts_BS - before_BS
