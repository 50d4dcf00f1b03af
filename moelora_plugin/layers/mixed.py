"""Batches whose sequences belong to different adapters: `adapter_names=["a", "__base__"]`.

Shape suffixes: T tokens, I in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..errors import ConfigError
from .routed import RoutedLayer, Shared

# PEFT's word for sequences that no adapter changes.
BASE = "__base__"


class MixedBatch:
    """Which adapter each sequence of a batch belongs to, in all calls of the model for a while.

    Attributes:
        names: the adapter of each sequence that the caller gave.
        only: within a block, the one whose rows are on their way; None elsewhere.
        shared: what the model's layers share.

    Args:
        names: see above.
        shared: what the model's layers share.
        may_multiply: whether the model may be called with several rows for each sequence, one after
            the other, as `generate` does for beams.
    """

    def __init__(self, names: Sequence[str], shared: Shared, may_multiply: bool) -> None:
        self.names = tuple(names)
        self.only: str | None = None
        self.shared = shared
        self._may_multiply = may_multiply

    def groups(self, rows: int) -> dict[str, list[int]]:
        """The rows of each adapter, in the order of their first ones.

        Args:
            rows: how many sequences a layer sees.

        Raises:
            ConfigError: they are not those that were named.
        """
        times, rest = divmod(rows, len(self.names))
        shape = self.shared.call.call.shape
        is_other = shape is not None and rows != shape[0]
        if is_other or rest or not times or (times > 1 and not self._may_multiply):
            raise ConfigError(
                f"adapter_names names an adapter for each of {len(self.names)} sequences, and a "
                f"layer got {rows} rows; give one name for each sequence of the batch, and leave "
                "modules that see something else out of target_modules."
            )
        found: dict[str, list[int]] = {}
        for row in range(rows):
            found.setdefault(self.names[row // times], []).append(row)
        return found

    def sequences(self, x: Tensor) -> Tensor:
        """A layer's input with the sequences first: (T, I) of a flat layer as (B, S, I)."""
        shape = self.shared.call.call.shape
        if x.ndim == 2 and shape is not None and shape[1] > 1 and len(x) == shape[0] * shape[1]:
            return x.view(*shape, x.shape[-1])
        return x

    @contextmanager
    def rows(self, index: list[int], only: str | None = None) -> Iterator[None]:
        """Inside, the model's call is that of these rows, and of the adapter `only` if given."""
        before, self.only = self.only, only
        with self.shared.call.of_rows(index):
            try:
                yield
            finally:
                self.only = before


@contextmanager
def mixed_batch(
    model: nn.Module, shared: Shared, names: Sequence[str], given: int | None = None
) -> Iterator[None]:
    """Have each sequence answered by the adapter that is named for it, inside the block.

    Each goes through its own adapter's routers, whatever is active: what a router knows of a call
    (padding, prompt, ids, what a cache keeps) is that of the adapter's own sequences.

    Args:
        model: the adapted model.
        shared: what its layers share.
        names: an adapter, or `BASE`, for each sequence.
        given: how many sequences there are, where that is known.

    Raises:
        ConfigError: the model is in training mode or merged, has no adapter of such a name, or
            there are more or fewer names than sequences.
    """
    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    _refuse(model, layers, names)
    if given is not None and given != len(names):
        raise ConfigError(
            f"adapter_names names an adapter for each of {len(names)} sequences, and the batch has "
            f"{given}; give one name for each."
        )
    mixed = MixedBatch(names, shared, may_multiply=given is not None)
    wrappers = [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    handles = [
        module.register_forward_pre_hook(partial(_pass_names, mixed), with_kwargs=True)
        for module in wrappers
    ]
    before, shared.mixed = shared.mixed, mixed
    try:
        yield
    finally:
        shared.mixed = before
        for handle in handles:
            handle.remove()


def by_adapter(mixed: MixedBatch, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """A module's output where each sequence has a router of its own adapter, or none.

    Args:
        mixed: whose sequences are whose.
        x: the module's input (..., in).
        run: what computes the output of one adapter's rows.
    """
    given = mixed.sequences(x)
    result: Tensor | None = None
    for adapter, index in mixed.groups(len(given)).items():
        mine = given[index] if given is x else given[index].flatten(0, 1)
        with mixed.rows(index, adapter):
            output = run(mine).view(len(index), *given.shape[1:-1], -1)
        if result is None:
            result = output.new_empty(*given.shape[:-1], output.shape[-1])
        result[index] = output
    assert result is not None
    return result.view(*x.shape[:-1], result.shape[-1])


def _refuse(model: nn.Module, layers: Sequence[RoutedLayer], names: Sequence[str]) -> None:
    if isinstance(names, str) or not names:
        raise ConfigError(f"adapter_names={names!r} must be a list with a name for each sequence.")
    if model.training:
        raise ConfigError(
            "adapter_names is for inference, and the model is in training mode; call model.eval()."
        )
    known = {name for layer in layers for name in layer._all_available_adapter_names()}
    unknown = sorted(set(names) - known - {BASE})
    if unknown:
        raise ConfigError(
            f"adapter_names has {unknown[0]!r}, and the model's adapters are "
            f"{', '.join(map(repr, sorted(known)))}; load it first, or name {BASE!r} for no "
            "adapter."
        )
    if any(layer.merged for layer in layers):
        raise ConfigError(
            "adapter_names needs the adapters beside the base's weights, and some are merged into "
            "them; call unmerge_adapter first."
        )


def _pass_names(
    mixed: MixedBatch, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Hook: PEFT's own wrappers take the names as an argument."""
    if mixed.shared.mixed is not mixed:  # another thread's call
        return args, kwargs
    groups = mixed.groups(len(args[0]))
    names = {row: adapter for adapter, index in groups.items() for row in index}
    return args, {**kwargs, "adapter_names": [names[row] for row in range(len(args[0]))]}
