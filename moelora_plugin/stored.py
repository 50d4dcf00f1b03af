"""Which of a model's tensors an adapter's file may hold: its own, and never the base's.

PEFT and transformers put every tensor of a file where its name says, so that a stranger's adapter
could change the base below it, which `disable_adapter` would not bring back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import chain

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .errors import AdapterError

MARK = ".moelora_"


def embedding_names(model: nn.Module) -> list[str]:
    """Names of the modules that PEFT saves whole where the vocabulary was resized, or adapted."""
    try:
        found = {model.get_input_embeddings(), model.get_output_embeddings()}  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # a model without them
        return []
    return [name for name, module in model.named_modules() if module in found]


def saved_whole(model: nn.Module) -> tuple[str, ...]:
    """How names begin of what PEFT saves beside an adapter: embeddings, and its own wrappers.

    It also writes names there that it does not read again.
    """
    wrapped = (n for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper))
    return tuple(f"{name}." for name in (*embedding_names(model), *wrapped))


def tensors_of_base(model: nn.Module, *, biases: bool) -> dict[str, Tensor]:
    """The tensors of an adapted model that no file of an adapter has.

    Args:
        model: with its adapters.
        biases: whether one of them trains biases of the base.
    """
    whole = saved_whole(model)
    return {
        name: tensor
        for name, tensor in _tensors(model)
        if MARK not in name
        and not name.startswith(whole)
        and not (biases and name.rpartition(".")[2] == "bias")
    }


def refuse_foreign(
    model: nn.Module,
    keys: Collection[str],
    prefix: str = "",
    *,
    adapters: Collection[str],
    biases: bool,
) -> None:
    """Look at the names of tensors that are about to be an adapter's.

    Args:
        model: with the adapter.
        keys: the names.
        prefix: what stands in them before a name in the model.
        adapters: the names of the model's adapters.
        biases: whether the adapter trains biases of the base.

    Raises:
        AdapterError: one is the base's, or has no place in the model.
    """
    known = {f"{prefix}{name}" for name, _ in _tensors(model)}
    known -= {f"{prefix}{name}" for name in tensors_of_base(model, biases=biases)}
    whole = tuple(f"{prefix}{name}" for name in saved_whole(model))
    unknown = [key for key in keys if key not in known and not key.startswith(whole)]
    has_own = any(MARK in key for key in known.intersection(keys))
    refuse_named(key for key in unknown if not (has_own and _is_another_s(key, adapters)))


def _is_another_s(key: str, adapters: Collection[str]) -> bool:
    """Whether a tensor is one of ours, of an adapter that is not in the model: it goes nowhere.

    PEFT before 0.20 writes the tensors of all adapters into the file of each, with their names.
    When it loads one, it puts that one's name before those, or leaves them (0.21).
    """
    names = key.partition(MARK)[2].split(".")[1:-1]
    return len(names) > 1 or (len(names) == 1 and names[0] not in adapters)


def refuse_named(foreign: Iterable[str]) -> None:
    """Refuse a file for the tensors in it that are no adapter's.

    Raises:
        AdapterError: there is one.
    """
    names = sorted(foreign)
    if names:
        raise AdapterError(
            f"The adapter's file holds {len(names)} tensors that have no place in the base, the "
            f"first being {names[0]}, or are the base's own; pass the base it was trained on "
            "(--base), or save or download it again."
        )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers that a state dict has, those that have two names by both."""
    for name, module in model.named_modules(remove_duplicate=False):
        here = f"{name}." if name else ""
        for key, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None and key not in module._non_persistent_buffers_set:
                yield f"{here}{key}", tensor
