"""Gates on rows that belong to one expert each, with a chosen exponent on the gates' backward.

Shape suffixes: P rows (a token for one of its experts), H features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..types import GateRescale
from .gate_rescale import surrogate_gates


def gate_rows(rows_PH: Tensor, gates_P: Tensor, rescale: GateRescale) -> Tensor:
    """Each row times its gate; in the backward the rows see gate^p in place of the gate.

    The gates receive their ordinary gradient <dy, row> in every mode. A gate of 0 counts as not
    selected, 0^0 being 0.

    Args:
        rows_PH: what the experts made of their rows.
        gates_P: their gates, in any floating dtype, fp32 or wider advised.
        rescale: p = 1 ("none"), 1/2 ("sqrt") or 0 ("exact").

    Returns:
        (P, H) in the rows' dtype.
    """
    gated: Tensor = _GateRows.apply(rows_PH, gates_P, rescale)  # type: ignore[no-untyped-call]
    return gated


def restore_gradient(rows_PH: Tensor, gates_P: Tensor, rescale: GateRescale) -> Tensor:
    """Identity whose backward multiplies each row by gate^(1 - p).

    Put before the experts, it makes of the surrogate g^p that `gate_rows` sent through them the
    true gradient g again. Both factors are at most 1 for gates in [0, 1], where dividing by
    g^(1 - p) at the experts' weights would overflow half precision for a small gate.
    """
    if rescale == "none":
        return rows_PH
    restored: Tensor = _ScaleGradient.apply(  # type: ignore[no-untyped-call]
        rows_PH, gates_P.detach().sqrt() if rescale == "sqrt" else gates_P.detach()
    )
    return restored


class _GateRows(torch.autograd.Function):
    """See `gate_rows`."""

    @staticmethod
    def forward(ctx: Any, rows_PH: Tensor, gates_P: Tensor, rescale: GateRescale) -> Tensor:
        ctx.save_for_backward(rows_PH, gates_P)
        ctx.rescale = rescale
        return rows_PH * gates_P.to(rows_PH.dtype).unsqueeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PH: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_PH, gates_P = ctx.saved_tensors
        grad_rows = grad_gates = None
        if ctx.needs_input_grad[0]:
            surrogate_P = surrogate_gates(gates_P, ctx.rescale)
            grad_rows = grad_PH * surrogate_P.to(grad_PH.dtype).unsqueeze(-1)
        if ctx.needs_input_grad[1]:
            grad_gates = (grad_PH.to(gates_P.dtype) * rows_PH.to(gates_P.dtype)).sum(-1)
        return grad_rows, grad_gates, None


class _ScaleGradient(torch.autograd.Function):
    """Identity; the gradient of each row is multiplied by its factor."""

    @staticmethod
    def forward(ctx: Any, rows_PH: Tensor, factors_P: Tensor) -> Tensor:
        ctx.save_for_backward(factors_P)
        return rows_PH.view_as(rows_PH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PH: Tensor) -> tuple[Tensor, None]:
        (factors_P,) = ctx.saved_tensors
        return grad_PH * factors_P.to(grad_PH.dtype).unsqueeze(-1), None
