"""Tensors that FSDP2 has sharded: put together for the metrics, and cut up again.

An expert's block of A may lie across two processes, and B^T B sums over all of them, so both the
factors and the gradients are gathered; every process then computes the same.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor (every process must ask for it); a plain tensor itself."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """What this process holds of `tensor`, which all have whole, where `like` is sharded."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    layout: Any = like
    everywhere = [Replicate()] * layout.device_mesh.ndim
    # No process talks to another here: each cuts its own copy.
    replicated = DTensor.from_local(tensor, layout.device_mesh, everywhere, run_check=False)
    return replicated.redistribute(placements=layout.placements)
