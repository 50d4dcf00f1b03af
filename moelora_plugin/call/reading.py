"""What the arguments of a call say.

Caches are found by what they can do and masks by the names that transformers gives them. A name
changes (`past_key_values` has become `cache`); that a cache tells its length does not.

Shape suffixes: B sequences, S positions, P planes of positions (time, height, width).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .documents import document_starts
from .view import Call, Memory, running

# A cache that is no object of transformers (a tuple, a state of the model's own) goes by its name.
_CACHE_NAMES = (
    "past_key_values",
    "cache",
    "cache_params",
    "past_key_value",
    "past",
    "mems",
    "state",
)
_TOKENS = ("input_ids", "inputs_embeds")
# What no cache is. A tuple: torch 2.9 cannot trace a union of types.
_PLAIN = (Tensor, bool, int, float, str, dict, tuple, list)
_OWN_STATES = ("inputs_embeds", "hidden_states")


def named_arguments(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """All arguments by name."""
    if not args:
        return kwargs
    names = inspect.signature(module.forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}


def read_call(
    module: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any],
    defaults: Mapping[str, Any],
    given: Mapping[str, Any] | None = None,
) -> Call:
    """What the arguments of a call of `module` say.

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
    arguments = named_arguments(module, args, kwargs)
    shape, cache = _shape(arguments), cache_among(arguments)
    past, has_past = _past(cache)
    real_BS = _real(arguments, shape, past)
    # Without tokens of its own a call's states are its own (features, pixels).
    others = [] if shape is None else memories(arguments)
    if shape is None and real_BS is not None:
        shape = (real_BS.shape[0], real_BS.shape[1])
    starts_BS = None if shape is None else document_starts(arguments, shape, real_BS)
    labels = arguments.get("labels")
    prompt_BS = None
    if isinstance(labels, Tensor) and shape is not None:
        prompt_BS = prompt_before(labels, shape, real_BS, starts_BS)
    positions = arguments.get("position_ids")
    alone = shape is not None and shape[1] == 1 and cache is None
    call = Call(
        shape,
        real_BS,
        prompt_BS,
        starts_BS,
        past,
        has_past,
        positions if alone and isinstance(positions, Tensor) else None,
        is_training=module.training and torch.is_grad_enabled(),
        labels=labels if isinstance(labels, Tensor) else None,
        memories=others,
    )
    for name, value in defaults.items():
        call.ids[name] = _expanded(name, value, call)
    for name, value in (given or {}).items():
        call.ids[name] = _checked(name, as_ids(name, value), call)
    return call


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments or outputs; None without one."""
    for value in arguments.values():
        if is_cache(value):
            return value
    for name in _CACHE_NAMES:
        if (value := arguments.get(name)) is not None:
            return value
    return None


def cache_of_output(output: Any) -> Any:
    """The cache that a call has made, where it is an object that a later call can bring."""
    values: Iterable[Any] = ()
    if isinstance(output, Mapping):
        values = output.values()
    elif isinstance(output, (tuple, list)):
        values = output
    return next((value for value in values if is_cache(value)), None)


def is_cache(value: Any) -> bool:
    """Whether an object can tell of a past, as transformers' caches can."""
    if value is None or isinstance(value, _PLAIN):
        return False
    return callable(getattr(value, "get_seq_length", None)) or hasattr(value, "has_previous_state")


def prompt_before(
    labels: Tensor,
    shape: tuple[int, int],
    real_BS: Tensor | None,
    starts_BS: Tensor | None,
    are_next_tokens: bool = False,
) -> Tensor:
    """True at the real positions before the first label that counts.

    Args:
        labels: the call's.
        shape: (B, S) of the tokens.
        real_BS: which are not padding.
        starts_BS: where further sequences begin.
        are_next_tokens: whether a label is that of the next position, as a decoder behind an
            encoder has them, and not that of its own.
    """
    if labels.shape == shape:
        counts_BS = labels != -100
        answered_BS = running(counts_BS, starts_BS)
        prompt_BS = (answered_BS - counts_BS.long() if are_next_tokens else answered_BS) == 0
    else:  # a label per sequence, or another sequence's: all that is read is the question
        prompt_BS = torch.ones(shape, dtype=torch.bool, device=labels.device)
    return prompt_BS if real_BS is None else prompt_BS & real_BS.to(prompt_BS.device)


def _shape(arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    for name in _TOKENS:
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.ndim > 1:
            return value.shape[0], value.shape[1]
    return None


def _real(
    arguments: Mapping[str, Any],
    shape: tuple[int, int] | None,
    past: int | Tensor | None,
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
    if mask.ndim == 4 and shape is not None and past is not None and mask.shape[2] in (1, shape[1]):
        # A finished mask (B, 1, S, all), as `generate` makes it for a cache that can be compiled,
        # or (B, 1, 1, all), the same for every position. A real one may attend to itself.
        positions_S = torch.arange(shape[1], device=mask.device)
        rows_S = positions_S if mask.shape[2] != 1 else torch.zeros_like(positions_S)
        own_BS = mask[:, 0, rows_S, positions_S + past]
        own_BS = own_BS >= 0 if own_BS.is_floating_point() else own_BS.bool()
        return own_BS.expand(shape)
    return None


def _past(cache: Any) -> tuple[int | Tensor | None, bool | None]:
    """How many positions a cache holds, or None and whether it holds any, where it tells that."""
    if cache is None:
        return 0, None
    length_of = getattr(cache, "get_seq_length", None)
    if callable(length_of):
        try:
            length: int | Tensor = length_of()
        except ValueError:  # none of its layers counts (linear attention)
            pass
        else:
            # A static cache hands out its own counter, which the first attention layer moves on.
            return (length.clone() if isinstance(length, Tensor) else length), None
    begun = getattr(cache, "has_previous_state", None)
    begun = begun() if callable(begun) else begun
    return None, begun if isinstance(begun, bool) else None


def memories(arguments: Mapping[str, Any]) -> list[Memory]:
    """States of another stream among the arguments: whatever has the shape of states."""
    found = []
    for name, value in arguments.items():
        if name in _OWN_STATES or not isinstance(value, Tensor):
            continue
        if value.ndim == 3 and value.is_floating_point():
            mask = arguments.get("encoder_attention_mask")
            if isinstance(mask, Tensor) and mask.shape == value.shape[:2]:
                found.append(Memory(value, mask.bool()))
            else:
                found.append(Memory(value))
    return found


def as_ids(name: str, value: Any) -> Tensor:
    """Ids as a tensor of whole numbers, () or (B,).

    Raises:
        ConfigError: they are something else.
    """
    ids = torch.as_tensor(value)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.ndim > 1:
        raise ConfigError(
            f"{name} must be one integer or one integer per sequence, got "
            f"{ids.dtype} of shape {tuple(ids.shape)}."
        )
    return ids.long()


def _expanded(name: str, ids: Tensor, call: Call) -> Tensor:
    """One id per row, where each sequence has become several rows in a row."""
    shape = call.shape
    if ids.ndim and shape is not None and len(ids) and call.documents is None:
        times, rest = divmod(shape[0], len(ids))
        ids = ids if rest else ids.repeat_interleave(times)
    return _checked(name, ids, call)


def _checked(name: str, ids: Tensor, call: Call) -> Tensor:
    if not ids.ndim or call.shape is None:
        return ids
    documents = call.documents
    sequences = call.shape[0] if documents is None else documents.count
    if len(ids) != sequences:
        packed = "" if documents is None else f" packed into {call.shape[0]} rows"
        raise ConfigError(
            f"{name} has {len(ids)} ids for {sequences} sequences{packed}; give one per sequence, "
            "or one integer for all."
        )
    return ids
