"""Which modules can take experts: those whose forward maps (..., in) to (..., out).

Nothing here goes by names. A class of linears with a forward of its own is asked what that forward
returns, on tensors without values; and the code of a module's parent says whether the parent calls
the module at all, or computes with its weight, which no adapter changes.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError
from ..quantization import is_plain

# These have in and out features that PEFT can read but do not compute x W^T.
_NOT_LINEAR = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
# Classes that quantisers put in a linear's place, with kernels that need values.
_QUANTISERS = ("transformers.integrations.", "bitsandbytes.", "torchao.")
# What reads of a weight tell about it without computing with it.
_METADATA = {
    "dtype",
    "device",
    "shape",
    "ndim",
    "size",
    "dim",
    "numel",
    "requires_grad",
    "data_ptr",
    "is_floating_point",
    "is_meta",
    "element_size",
    "layout",
}
_PREDICATES = {"isinstance", "hasattr", "getattr", "type", "id", "len", "print"}


def features(base: nn.Module) -> tuple[int, int]:
    """In and out features of a module.

    Raises:
        ConfigError: it has none, or its class is known for another kind of map.
    """
    with warnings.catch_warnings():
        # PEFT warns about classes it does not know and still answers; what it answers decides.
        warnings.simplefilter("ignore", UserWarning)
        in_features, out_features = (
            (None, None) if isinstance(base, _NOT_LINEAR) else _get_in_out_features(base)
        )
    if in_features is None or out_features is None:
        raise ConfigError(
            f"Cannot adapt {type(base).__name__}: experts need a linear map; remove it from "
            "target_modules or name it in exclude_modules."
        )
    if torch.is_complex(getattr(base, "weight", torch.empty(0))):
        raise ConfigError(
            f"Cannot adapt {type(base).__name__} with complex weights, which gates have no order "
            "for; remove it from target_modules or name it in exclude_modules."
        )
    return int(in_features), int(out_features)


def is_packed_linear(module: nn.Module) -> bool:
    """Whether a module is a quantiser's own linear, which is none of torch's (GPTQ, AWQ, HQQ).

    By the name of its class, as hosts tell, and by weights that are no plain numbers.
    """
    if isinstance(module, nn.Linear) or "Linear" not in type(module).__name__:
        return False
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if any(True for _ in module.children()) or all(map(is_plain, tensors)):
        return False
    try:
        features(module)
    except ConfigError:
        return False
    return True


def maps_rows(base: nn.Module) -> bool:
    """Whether the forward of a module with features maps (..., in) to (..., out).

    A router that is an nn.Linear and returns a tuple does not, nor does a stack of experts that
    asks for more than x. Modules of quantisers, whose weight is no plain floating-point tensor of
    two bytes or more, are taken at their word.
    """
    kind = type(base)
    if kind in (nn.Linear, Conv1D) or kind.forward is nn.Linear.forward:
        return True
    weight = getattr(base, "weight", None)
    if (
        type(weight) is not nn.Parameter
        or not weight.is_floating_point()
        or weight.element_size() < 2
        or kind.__module__.startswith(_QUANTISERS)
    ):
        return True
    in_features, out_features = features(base)
    state = {
        name: torch.empty_like(tensor, device="meta", requires_grad=False)
        for name, tensor in [*base.named_parameters(), *base.named_buffers()]
    }
    # A number of rows that nothing divides: a forward that splits them into groups fails.
    x = torch.empty(5, 7, in_features, device="meta", dtype=weight.dtype)
    try:
        with torch.no_grad():
            output = torch.func.functional_call(base, state, (x,), strict=False)
    except (TypeError, RuntimeError, ValueError, IndexError):
        return False
    return isinstance(output, Tensor) and output.shape == (5, 7, out_features)


def adds_updates(base: nn.Module) -> bool:
    """Whether what is added to the weight is added to the output: f(x; W + D) = f(x; W) + x D^T.

    A merge is right for no other forward: one that multiplies the product, or squashes it, applies
    that to a merged update as well. Asked of classes with a forward of their own only, by a random
    D of the weight's size, since float addition alone would pass a smaller one.

    Args:
        base: a module with a plain weight in its parent's layout, nn.Linear's or Conv1D's.
    """
    kind, weight = type(base), base.weight
    assert isinstance(weight, Tensor)
    if kind in (nn.Linear, Conv1D) or kind.forward is nn.Linear.forward or weight.is_meta:
        return True
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(weight.device)

    in_features, _ = features(base)
    state = {
        name: tensor.detach().double() if tensor.is_floating_point() else tensor.detach()
        for name, tensor in [*base.named_parameters(), *base.named_buffers()]
    }
    x, update = drawn(3, in_features), drawn(*weight.shape) * state["weight"].std()
    added = x @ (update if isinstance(base, Conv1D) else update.T)
    try:
        with torch.no_grad():
            before = torch.func.functional_call(base, state, (x,))
            after = torch.func.functional_call(base, {**state, "weight": weight + update}, (x,))
            # In fp64: what a forward that casts to fp32 rounds away is far below what differs.
            return bool(torch.allclose(after - before, added, rtol=1e-3, atol=1e-3))
    except (TypeError, RuntimeError, ValueError, IndexError):
        return False


@functools.cache
def weights_read(parent: type) -> dict[str, str]:
    """Children whose weight the code of a module's class computes with, past their forward.

    Args:
        parent: the class. What its forward reaches through methods of its own is read.

    Returns:
        By the child's path in the parent, how: "never called" where its forward is not used at
        all (nn.MultiheadAttention's out_proj, Mamba's dt_proj), or "in a branch" where some branch
        multiplies by the whole weight or hands it to a function, as fused kernels ask for (Mamba's
        out_proj).
    """
    reads: dict[str, bool] = {}
    used: set[str] = set()
    todo, done = ["forward"], set()
    while todo:
        name = todo.pop()
        if name in done:
            continue
        done.add(name)
        function = _parsed(parent, name)
        if function is None:
            continue
        owner = function.args.args[0].arg if function.args.args else "self"
        for path, above in _chains(function, owner):
            first, *rest = path
            if not rest and inspect.isfunction(getattr(parent, first, None)):
                todo.append(first)
            child, attribute = ".".join(path[:-1]), path[-1]
            index = next((i for i, part in enumerate(path) if part in ("weight", "bias")), None)
            if index is None:
                used.add(".".join(path))
            elif path[index] == "weight" and index > 0:
                child, attribute = ".".join(path[:index]), ".".join(path[index + 1 :])
                if attribute.partition(".")[0] in _METADATA or _is_question(above):
                    continue
                whole = not attribute and isinstance(above, ast.Call | ast.keyword | ast.BinOp)
                reads[child] = reads.get(child, False) or whole
    return {
        child: "in a branch" if child in used else "never called"
        for child, whole in reads.items()
        if whole or child not in used
    }


def _parsed(cls: type, method: str) -> ast.FunctionDef | None:
    function = getattr(cls, method, None)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError):  # compiled, or made at run time
        return None
    found = tree.body[0] if tree.body else None
    return found if isinstance(found, ast.FunctionDef) else None


def _chains(function: ast.FunctionDef, owner: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each longest `self.a.b.c` of a function as ("a", "b", "c"), and the node above it."""
    above: dict[ast.AST, ast.AST] = {
        child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)
    }
    for node in ast.walk(function):
        if not (isinstance(node, ast.Name) and node.id == owner):
            continue
        parts, top = [], above.get(node)
        inner: ast.AST = node
        while isinstance(top, ast.Attribute):
            parts.append(top.attr)
            inner, top = top, above.get(top)
        if parts:
            yield tuple(parts), top if not _calls(top, inner) else None


def _calls(top: Any, inner: ast.AST) -> bool:
    """Whether a node is called itself, and not handed to a call."""
    return isinstance(top, ast.Call) and top.func is inner


def _is_question(above: Any) -> bool:
    name = getattr(above, "func", None)
    return isinstance(name, ast.Name) and name.id in _PREDICATES
