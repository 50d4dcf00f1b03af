"""Riemannian optimizers for mixtures of LoRA experts (and for plain LoRA, which is one expert)."""

from __future__ import annotations

from .build import OPTIMIZERS, OptimizerSpec, build_optimizer
from .in_backward import PreconditioningHandle, precondition_in_backward
from .riemannian import RiemannianAdamW, RiemannianSGD

__all__ = [
    "OPTIMIZERS",
    "OptimizerSpec",
    "PreconditioningHandle",
    "RiemannianAdamW",
    "RiemannianSGD",
    "build_optimizer",
    "precondition_in_backward",
]
