"""Riemannian optimizers for mixtures of LoRA experts (and for plain LoRA, which is one expert)."""

from __future__ import annotations

from .build import OPTIMIZERS, OptimizerSpec, build_optimizer
from .riemannian import RiemannianAdamW, RiemannianSGD

__all__ = ["OPTIMIZERS", "OptimizerSpec", "RiemannianAdamW", "RiemannianSGD", "build_optimizer"]
