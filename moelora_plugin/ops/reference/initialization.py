"""Initial values from a singular value decomposition, one component at a time.

Shape suffixes: I in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def svd_updates_loop(
    weight_OI: Tensor, components: Sequence[Sequence[int]], rho: float
) -> list[Tensor]:
    """Each expert's s B_i A_i: the sum of its components u s v^T, divided by rho.

    Args:
        weight_OI: the base's weight.
        components: for each expert the indexes of its components, 0 for the largest.
        rho: divides the singular values.
    """
    u, s, vt = torch.linalg.svd(weight_OI, full_matrices=False)
    updates = []
    for indexes in components:
        update = torch.zeros_like(weight_OI)
        for index in indexes:
            update = update + s[index] / rho * torch.outer(u[:, index], vt[index])
        updates.append(update)
    return updates
