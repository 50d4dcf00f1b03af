"""What the adapted layers of one model know about the call they are part of.

A linear in the middle of a network sees its own input only. Which tokens are padding, which belong
to the prompt, whether a cache holds the past and which task a sequence belongs to are read from the
arguments of the model's call, by a hook on the model.

Shape suffixes: B sequences, S positions, T tokens (B times S).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# Arguments of a model's call that are ours: ids of each sequence (B,), taken out before the model
# sees them. PEFT's own forward swallows one called `task_ids`.
ROUTING_IDS = ("task_id", "cluster_id")


@dataclass(frozen=True)
class Call:
    """One call of the model.

    Attributes:
        real_BS: True where a position is not padding; None where no mask says so.
        prompt_BS: True where a position is real and not part of the answer, which is where the
            labels are -100; None without labels.
        past: how many positions a cache holds already: 0 at the first call of a generation.
        ids: the sequences' ids (B,) or one id for all, by their name in `ROUTING_IDS`.
    """

    real_BS: Tensor | None = None
    prompt_BS: Tensor | None = None
    past: int = 0
    ids: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def real_T(self) -> Tensor | None:
        """`real_BS` by token."""
        return None if self.real_BS is None else self.real_BS.flatten()


class CallContext:
    """Shared by all adapted layers of one model.

    A recomputation under activation checkpointing runs after the model's forward has returned, and
    perhaps after another call (a reference model's, an evaluation's), so the last training call is
    kept for it.

    Attributes:
        ids: ids for calls that do not bring their own, by name; see `routing_ids`.
        before_call: run before each training call, with the call: for state that must not change
            between a forward and its recomputation.
    """

    def __init__(self) -> None:
        self.ids: dict[str, Tensor] = {}
        self.before_call: list[Callable[[Call], None]] = []
        self._current: Call | None = None
        self._training = Call()
        self._watched: set[int] = set()

    @property
    def call(self) -> Call:
        """The call that is going on, or the training call that is being recomputed."""
        return self._training if self._current is None else self._current

    def watch(self, model: nn.Module) -> None:
        """Learn from each call of `model`; a second time does nothing."""
        if not self._watched:
            self._watched.add(id(model))
            model.register_forward_pre_hook(self._begin, with_kwargs=True)
            model.register_forward_hook(self._end, always_call=True)

    def _begin(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        given = {name: kwargs[name] for name in ROUTING_IDS if kwargs.get(name) is not None}
        kwargs = {name: value for name, value in kwargs.items() if name not in ROUTING_IDS}
        self._current = read_call(module, args, kwargs, {**self.ids, **given})
        if module.training and torch.is_grad_enabled():
            self._training = self._current
            for function in self.before_call:
                function(self._current)
        return args, kwargs

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._current = None


@contextmanager
def set_ids(context: CallContext, **ids: Tensor | int | list[int]) -> Iterator[None]:
    """Give the calls inside the block their ids."""
    before = context.ids
    context.ids = {**before, **{name: torch.as_tensor(value) for name, value in ids.items()}}
    try:
        yield
    finally:
        context.ids = before


def read_call(
    module: nn.Module, args: Any, kwargs: Mapping[str, Any], ids: Mapping[str, Tensor]
) -> Call:
    """What the arguments of a call of `module` say, found by name.

    With a cache the attention mask covers the past as well: its last columns are the current
    positions.
    """
    names = inspect.signature(module.forward).parameters
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    inputs = (arguments.get(name) for name in ("input_ids", "inputs_embeds"))
    length = next((i.shape[1] for i in inputs if isinstance(i, Tensor) and i.ndim > 1), None)
    cache = arguments.get("past_key_values")
    past_length = getattr(cache, "get_seq_length", None)
    past = int(past_length()) if callable(past_length) else 0
    mask, labels = arguments.get("attention_mask"), arguments.get("labels")
    real_BS = None
    if isinstance(mask, Tensor) and mask.ndim == 2:
        length = mask.shape[1] if length is None else length
        real_BS = mask[:, mask.shape[1] - length :].bool()
    prompt_BS = None
    if isinstance(labels, Tensor) and labels.ndim == 2 and labels.shape[1] == length:
        prompt_BS = labels == -100
        if real_BS is not None:
            prompt_BS = prompt_BS & real_BS
    return Call(real_BS, prompt_BS, past, ids)
