"""Experts that choose themselves by how strongly they answer.

Shape suffixes: N rows, E experts, r one expert's rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...types import Rows
from .base import Score, widened


class SelfNormScore(Score):
    """The norm of each expert's own activation, ||A_i x||_2: no gate to train.

    Autonomy-of-Experts (arXiv 2501.13074) selects the k experts of largest norm and weighs them by
    the softmax of the norms; A x is what the expert computes first in any case. The gates' gradient
    reaches A through the norm. In fp32 or wider.
    """

    def reset_parameters(self) -> None:
        """There are none."""

    def forward(self, rows: Rows, a: Tensor | None) -> Tensor:
        """Logits (N, E), at least 0."""
        activations = self.expert_activations(rows, a)
        if self.plan.is_uniform:
            return _norm(torch.stack(activations, -2))
        return torch.stack([_norm(z_Nr) for z_Nr in activations], -1)


def _norm(z: Tensor) -> Tensor:
    """Over the last dimension; its gradient at zero is zero."""
    norm: Tensor = torch.linalg.vector_norm(widened(z), dim=-1)
    return norm
