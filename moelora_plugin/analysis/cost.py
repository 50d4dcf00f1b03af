"""What a training step takes, counted on a model without weights.

The step runs on torch's fake tensors: every operation happens with its shapes and dtypes, and
nothing is computed or allocated. So the counts are those of the code that trains, whatever the
adapter; there are no formulas to keep in step with it. docs/performance.md has the formulas.

Shape suffixes: B sequences, S positions.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..errors import ConfigError, first_line
from ..types import ExpertPair

# What depends on the data, such as the number of rows that a threshold lets through.
_UNKNOWN = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass(frozen=True)
class StepCost:
    """One forward and backward pass of a whole model.

    Attributes:
        forward: floating-point operations of the forward's matrix products, a multiplication and an
            addition being two.
        backward: those of the backward, recomputation under checkpointing included.
        saved_bytes: what is kept from the forward for the backward, weights excluded.
        peak_bytes: the most that is held at once on top of the weights: what is saved, what is
            being computed, and the gradients.
    """

    forward: int
    backward: int
    saved_bytes: int
    peak_bytes: int

    @property
    def operations(self) -> int:
        """Of both passes."""
        return self.forward + self.backward


def step_cost(
    model: nn.Module,
    batch: int,
    length: int,
    *,
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
    arguments: Iterable[str] = (),
) -> StepCost | None:
    """Count one training step of a causal language model.

    Args:
        model: on the meta device; it is of no further use.
        batch: B, sequences at once.
        length: S, tokens in each of them; there is no padding.
        autocast: run the forward under autocast to this dtype.
        checkpointing: keep the inputs of each layer only, and run it again in the backward.
        arguments: names of further arguments of the call that get one id for all sequences.

    Returns:
        The counts; None where they depend on the data.

    Raises:
        ConfigError: the model's code asks for values, or for more than ids.
    """
    model.train()
    if checkpointing:
        with warnings.catch_warnings():
            # The name that transformers 5.6 knows; later ones have another as well.
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        embeddings.register_forward_hook(_require_gradient)
        ids_BS = torch.zeros(batch, length, dtype=torch.long)
        inputs: dict[str, Any] = {"input_ids": ids_BS, "labels": ids_BS, "use_cache": False}
        # Ids are checked before they are looked up; a single one's value is remembered.
        inputs |= {name: torch.tensor(0) for name in arguments}
        counter = FlopCounterMode(display=False, custom_mapping=_PRODUCTS)
        products = _GroupedProducts()  # type: ignore[no-untyped-call]
        memory = _LiveMemory([*model.parameters(), *model.buffers(), ids_BS])
        cast: AbstractContextManager[Any] = (
            torch.autocast("cpu", autocast) if autocast else nullcontext()
        )
        try:
            # The last is asked first: what is counted has not been replaced yet.
            with products, counter, memory:
                with cast:
                    loss = model(**inputs).loss
                forward, saved = counter.get_total_flops(), memory.now
                loss.backward()
        except _UNKNOWN:
            return None
        except Exception as error:
            # The base's own code runs here, on tensors that it was not written for.
            raise ConfigError(
                f"A training step of this base cannot be counted without weights "
                f"({type(error).__name__}: {first_line(error)}); plan another base with --model, "
                "or measure a step of this one."
            ) from error
        return StepCost(forward, counter.get_total_flops() - forward, saved, memory.peak)


class _LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive.

    Args:
        ignored: tensors that were there before.
    """

    def __init__(self, ignored: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        # A storage keeps its Python object as long as it lives, so the id names it.
        self._known = {id(tensor.untyped_storage()) for tensor in ignored}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation and count what it has made."""
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._known:
            return
        self._known.add(id(storage))
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, id(storage), storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _GroupedProducts(TorchDispatchMode):
    """Gives the products of fused experts, each with its own tokens, their shapes.

    torch's own answer for tensors without values is that of one GPU kernel: bfloat16 alone, and
    widths of whole 16 bytes.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation, or say what it would give."""
        if func is not torch.ops.aten._grouped_mm.default:
            return func(*args, **(kwargs or {}))
        a, b, offsets = args[0], args[1], (args[2] if len(args) > 2 else (kwargs or {})["offs"])
        rows, columns = a.shape[-2], b.shape[-1]
        stacked = a.ndim == b.ndim  # a sum over each group's tokens, or one product per group
        groups = len(offsets) if a.ndim == 2 else a.shape[0]
        return a.new_empty((groups, rows, columns) if stacked else (rows, columns))


class _Differentiated(torch.autograd.Function):
    """The same tensor, with a history."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        """Mark `output` as one that `anchor` has to do with."""
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        """Nothing is asked for."""
        return None, None


def _require_gradient(module: nn.Module, args: Any, output: Any) -> Any:
    """Hook: a frozen base is differentiated as below an adapter of its first layer.

    So a base alone can be subtracted from an adapted one; that one keeps its first norm in excess.
    The output gets a history and does not become a leaf, which some bases change in place.
    """
    if isinstance(output, Tensor) and not output.requires_grad:
        return _Differentiated.apply(output, torch.zeros((), requires_grad=True))  # type: ignore[no-untyped-call]
    return output


def _attention_forward(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    batch, heads, rows, width = query
    return int(2 * batch * heads * rows * key[2] * (width + value[3]))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *a: Any, **k: Any) -> int:
    # Five products where the forward has two: the scores are computed again.
    return _attention_forward(query, key, value) * 5 // 2


def _grouped_product(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    # Each row meets one group's matrix; with two stacks, each matrix one other.
    stack = a[0] if len(a) == len(b) == 3 else 1
    return int(2 * stack * a[-2] * a[-1] * b[-1])


# torch counts the attention kernels of accelerators, and not those of the CPU, nor fused experts.
_PRODUCTS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten._grouped_mm: _grouped_product,
}


def preconditioning_operations(pairs: Iterable[ExpertPair]) -> int:
    """Floating-point operations that eq. 6 of arXiv 2502.15828 needs per optimizer step.

    An expert of rank r has the metrics A A^T and B^T B, 2 r^2 (I + O); a Cholesky factorisation and
    an inverse for each, 2 r^3 together; and their products with both gradients, 2 r^2 (I + O) once
    more. Where experts share a factor, so do they its metric's inverse.
    """
    total = 0
    for pair in pairs:
        # Both factors have r rows for each expert they hold: entries of one expert meet r others.
        entries = pair.a.numel() + pair.b.numel()
        ranks = pair.ranks if pair.shared == "none" else pair.ranks[:1]
        squares = sum(r * r for r in ranks) / sum(ranks)
        learners = sum(isinstance(factor, nn.Parameter) for factor in (pair.a, pair.b))
        # Of each factor that trains: the partner's metric, its inverse, the product with the own.
        total += learners * (round(2 * squares * entries) + sum(r**3 for r in ranks))
    return total
