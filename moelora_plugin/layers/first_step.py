"""Whether an adapter's first training step reached all its linears.

A linear that the model never calls, or whose output it drops, trains nothing, and no loss shows it:
the last layer of a vision tower whose features are taken earlier, a tower that no batch has images
for, a head that is not used. Nor does it show that the step moved what no adapter holds.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import ReachWarning
from .linear import MoeLoraLinear

_SHOWN = 8


class FirstStep:
    """Warns once, at the end of the first backward of a model's call, of linears without gradient.

    It costs the layers nothing: all of it happens once, in a hook on the model that then goes.
    Nothing is said where that backward cannot tell: under compilation, with sharded parameters,
    and where engines take gradients away at once. Experts of the base that are modules of their own
    may get no token in one step: of a list of modules inside a layer, one that was reached stands
    for all.

    Args:
        adapter: whose linears.
    """

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self._is_queued = False

    def watch(self, model: nn.Module) -> None:
        """Start at the next training call of `model`."""
        model.register_forward_hook(self._after_call)

    def _after_call(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
            return
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                value.register_hook(functools.partial(self._begin, model))

    def _begin(self, model: nn.Module, grad: Tensor) -> None:
        if not self._is_queued:
            self._is_queued = True
            # Runs when all gradients of this backward are there.
            torch.autograd.Variable._execution_engine.queue_callback(
                functools.partial(self._report, model)
            )

    def _report(self, model: nn.Module) -> None:
        self._is_queued = False
        reached, missed = self._by_gradient(model)
        if not reached:
            return
        _unwatch(model, lambda owner: owner is self)
        self._warn_of_statistics(model)
        alive = {stem(name, keep=1) for name in reached}
        dead = [name for name in missed if stem(name, keep=1) not in alive]
        if dead:
            warnings.warn(
                f"The first training step did not reach {len(dead)} adapted linears, which learn "
                f"nothing from such a step: {_shown(dead, reached)}; leave them out with "
                "exclude_modules unless other batches use them.",
                ReachWarning,
                stacklevel=2,
            )

    @staticmethod
    def _warn_of_statistics(model: nn.Module) -> None:
        norms = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and module.training
            and module.track_running_stats
            # A whole copy of it trains and is saved.
            and not {"original_module", "modules_to_save"} & set(name.split("."))
        ]
        if norms:
            warnings.warn(
                f"Training moves the running statistics of the base's {len(norms)} batch norms, "
                "which no adapter file holds, so the saved adapter will answer otherwise: "
                f"{_shown(norms, [])}; keep them in eval mode, or name them in modules_to_save.",
                ReachWarning,
                stacklevel=2,
            )

    def _by_gradient(self, model: nn.Module) -> tuple[list[str], list[str]]:
        """Names of the linears that train, with a gradient and without."""
        reached: list[str] = []
        missed: list[str] = []
        for name, layer in model.named_modules():
            if not isinstance(layer, MoeLoraLinear) or self.adapter not in layer.active_adapters:
                continue
            parameters = [p for p in layer.tensors(self.adapter).values() if p.requires_grad]
            if any(hasattr(parameter, "full_tensor") for parameter in parameters):
                return [], []
            if parameters:
                is_reached = any(parameter.grad is not None for parameter in parameters)
                (reached if is_reached else missed).append(name)
        return reached, missed


def stem(name: str, keep: int) -> str:
    """A name with all numbers but the first few as stars."""
    parts = re.split(r"(\d+)", name)
    numbers = range(1 + 2 * keep, len(parts), 2)
    return "".join("*" if i in numbers else part for i, part in enumerate(parts))


def _shown(names: list[str], others: list[str]) -> str:
    """Names, with stars for numbers where several differ in those alone and no other does."""
    stems = Counter(stem(name, keep=0) for name in names)
    elsewhere = {stem(name, keep=0) for name in others}
    shown = set()
    for name in names:
        star = stem(name, keep=0)
        shown.add(star if stems[star] > 1 and star not in elsewhere else name)
    listed = sorted(shown)
    rest = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + rest


def unwatch_first_steps(model: nn.Module) -> None:
    """Take the hooks out that no step has come by."""
    _unwatch(model, lambda owner: isinstance(owner, FirstStep))


def _unwatch(model: nn.Module, is_meant: Callable[[Any], bool]) -> None:
    """By owner, since a copy of the model has no handles of its own."""
    hooks = model._forward_hooks
    for key in [k for k, hook in hooks.items() if is_meant(getattr(hook, "__self__", None))]:
        del hooks[key]
