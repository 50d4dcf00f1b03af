"""From a model and a name to an optimizer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..lookup import unknown_name_message
from ..model import find_tuner
from ..types import GateRescale
from .groups import parameter_groups
from .riemannian import RiemannianAdamW, RiemannianSGD


@dataclass(frozen=True)
class OptimizerSpec:
    """What an optimizer's name stands for.

    Attributes:
        summary: one line.
        optimizer: the class.
        gate_rescale: the exponent that an adapter with `gate_rescale="auto"` gets.
    """

    summary: str
    optimizer: type[RiemannianSGD] | type[RiemannianAdamW]
    gate_rescale: GateRescale


OPTIMIZERS: dict[str, OptimizerSpec] = {
    "rsgd": OptimizerSpec("Riemannian SGD", RiemannianSGD, "none"),
    "grsgd": OptimizerSpec("Riemannian SGD, gate-rescaled (eq. 13)", RiemannianSGD, "sqrt"),
    "radamw": OptimizerSpec("Riemannian AdamW", RiemannianAdamW, "none"),
    "gradamw": OptimizerSpec("Riemannian AdamW, gate-rescaled (eq. 13)", RiemannianAdamW, "sqrt"),
}


def build_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float = 1e-5,
    gate_lr: float = 3e-8,
    gate_max_grad_norm: float | None = 1.0,
    damping: float = 1e-6,
    order: str = "jacobi",
    scale_compensation: bool = False,
    lora_plus_ratio: float = 1.0,
    weight_decay: float = 0.0,
    bias_correction: bool = True,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    **base: Any,
) -> torch.optim.Optimizer:
    """The optimizer called `name` over everything in `model` that trains.

    Also resolves the adapters' `gate_rescale="auto"`: "sqrt" for grsgd and gradamw, "none" for rsgd
    and radamw. An explicit value in an adapter's config wins, with a warning where the name says
    otherwise. A model with plain PEFT LoRA layers is taken as mixtures of one expert each.

    Build it after the adapter is in place and in its final dtype: PEFT and accelerate replace
    parameters.

    Args:
        model: a PeftModel (or any module) with MoE-LoRA or LoRA layers.
        name: "rsgd", "grsgd", "radamw" or "gradamw".
        lr: learning rate of the experts and of other trainable parameters. The paper uses 1e-5 to
            3e-5 with AdamW and 3e-5 with SGD on 3B models.
        gate_lr: learning rate of the gates. The paper's 3e-8 all but freezes the router.
        gate_max_grad_norm: the gates' gradients are clipped to this joint norm; None switches it
            off.
        damping: added to the metrics' diagonal, in the unit of squared factor entries.
        order: "jacobi" (eq. 6, default) or "gauss_seidel" (the reference AdamW).
        scale_compensation: divide the preconditioned gradients by the squared LoRA scale.
        lora_plus_ratio: B's learning rate over A's.
        weight_decay: decoupled (AdamW) or L2 (SGD); not applied to gates, biases and norms.
        bias_correction: AdamW only; False reproduces the reference code.
        betas: AdamW only.
        eps: AdamW only; added to sqrt(v).
        **base: further options of torch's SGD or AdamW (momentum, fused, foreach, ...).

    Returns:
        A RiemannianSGD or RiemannianAdamW.

    Raises:
        ConfigError: unknown name (nearest offered), nothing to train, or an option out of range.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(unknown_name_message("optimizer", name, OPTIMIZERS))
    spec = OPTIMIZERS[name]
    _resolve_gate_rescale(model, name, spec.gate_rescale)
    groups = parameter_groups(
        model,
        lr=lr,
        gate_lr=gate_lr,
        gate_max_grad_norm=gate_max_grad_norm,
        weight_decay=weight_decay,
    )
    riemannian: dict[str, Any] = {
        "lr": lr,
        "damping": damping,
        "order": order,
        "scale_compensation": scale_compensation,
        "lora_plus_ratio": lora_plus_ratio,
    }
    if spec.optimizer is RiemannianAdamW:
        return RiemannianAdamW(
            groups,
            **riemannian,
            bias_correction=bias_correction,
            betas=tuple(betas),
            eps=eps,
            **base,
        )
    return RiemannianSGD(groups, **riemannian, **base)


def _resolve_gate_rescale(model: nn.Module, name: str, mode: GateRescale) -> None:
    tuner = find_tuner(model)
    if tuner is None:
        return
    for adapter in tuner.active_adapters:
        chosen = tuner.config_of(adapter).gate_rescale
        if chosen == "auto":
            tuner.set_gate_rescale(mode, adapter)
        elif chosen != mode:
            warnings.warn(
                f"{name} stands for gate_rescale={mode!r}, but adapter {adapter!r} says "
                f"{chosen!r}, which is used.",
                UserWarning,
                stacklevel=3,
            )
