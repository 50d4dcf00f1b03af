"""Whether the values that an adapter's file was to bring have come.

An initialisation that reads the base or files is left out where the values are to come from the
adapter's file. All its tensors are zero until a loader fills them, and PEFT's, transformers' and
torch's own loaders put them there by different ways: what tells is the values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor

from ..errors import ConfigError
from .linear import MoeLoraLinear


class AwaitedValues:
    """Refuses calls and merges of an adapter that has no values, and would seem to do nothing.

    It waits in a hook on the model, which goes at the first call that finds the values there, so
    that later calls cost nothing more.

    Args:
        adapter: whose linears.
        init: the initialisation that left all values to the adapter's file.
    """

    def __init__(self, adapter: str, init: str) -> None:
        self.adapter = adapter
        self.init = init

    def watch(self, model: nn.Module) -> None:
        """Start at the next call of `model`."""
        model.register_forward_pre_hook(self._before_call)

    def refuse_empty(self, model: nn.Module) -> None:
        """Look at the adapter's linears in `model`.

        Raises:
            ConfigError: the file that the values were left to was not loaded.
        """
        if self._has_values(model) is False:
            raise ConfigError(
                f"Adapter {self.adapter!r} has no values: its configuration was read from a file "
                f"or is for inference, so init={self.init!r} left them to the adapter's weights, "
                "which were not loaded; load the adapter by PeftModel.from_pretrained(base, "
                "folder), or start a new one from MoeLoraConfig(...)."
            )

    def _before_call(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        acts = (
            self.adapter in linear.acting_adapters and not linear.disable_adapters
            for linear in self._linears(model)
        )
        if any(acts):
            self.refuse_empty(model)
        if self._has_values(model) or next(self._linears(model), None) is None:
            unwatch_awaited(model, self.adapter)

    def _has_values(self, model: nn.Module) -> bool | None:
        """None where there are shapes alone: `moelora plan` counts, or a load has yet to come."""
        tensors = [
            t for linear in self._linears(model) for t in linear.tensors(self.adapter).values()
        ]
        if not tensors or any(t.is_meta or isinstance(t, FakeTensor) for t in tensors):
            return None
        return any(bool(tensor.any()) for tensor in tensors)

    def _linears(self, model: nn.Module) -> Iterator[MoeLoraLinear]:
        for module in model.modules():
            if isinstance(module, MoeLoraLinear) and self.adapter in module.moelora_mixture:
                yield module


def refuse_awaited(model: nn.Module, adapter: str) -> None:
    """Refuse to fold an adapter without values.

    Raises:
        ConfigError: see `AwaitedValues`.
    """
    for module in model.modules():
        for _, owner in _waiting(module, adapter):
            owner.refuse_empty(module)


def unwatch_awaited(model: nn.Module, adapter: str | None = None) -> None:
    """Take the hooks on `model` out: an adapter's, or all."""
    for key, _ in _waiting(model, adapter):
        del model._forward_pre_hooks[key]


def _waiting(model: nn.Module, adapter: str | None) -> list[tuple[int, AwaitedValues]]:
    """By owner, since a copy of the model has no handles of its own."""
    owners = [(k, getattr(h, "__self__", None)) for k, h in model._forward_pre_hooks.items()]
    return [
        (key, owner)
        for key, owner in owners
        if isinstance(owner, AwaitedValues) and adapter in (None, owner.adapter)
    ]
