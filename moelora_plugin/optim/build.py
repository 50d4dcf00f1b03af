"""From a model and a name to an optimizer."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ..errors import ConfigError
from ..lookup import unknown_name_message
from ..model import active_configs, use_gate_rescale
from ..types import GateRescale
from .engines import refuse_unsupported_engine
from .groups import EXPERTS, GATES, Group, factors_of, parameter_groups
from .in_backward import precondition_in_backward, remove_preconditioning
from .riemannian import RiemannianAdamW, RiemannianSGD, check_damping, fuse_where_possible

# The paper's, which all but freezes the router.
_GATE_LR = 3e-8


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
    gate_lr: float = _GATE_LR,
    gate_max_grad_norm: float | None = 1.0,
    damping: float = 1e-6,
    order: str = "jacobi",
    scale_compensation: bool = False,
    lora_plus_ratio: float = 1.0,
    weight_decay: float = 0.0,
    bias_correction: bool = True,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    in_backward: bool = False,
    **base: Any,
) -> torch.optim.Optimizer:
    """The optimizer called `name` over everything in `model` that trains.

    Also resolves the adapters' `gate_rescale="auto"`: "sqrt" for grsgd and gradamw, "none" for rsgd
    and radamw. An explicit value in an adapter's config wins, with a warning where the name says
    otherwise. A model with plain PEFT LoRA layers is taken as mixtures of one expert each.

    Build it after the adapter is in place and in its final dtype: PEFT replaces parameters. FSDP2
    may shard before or after. Building another one for the same model starts over: "auto" is
    settled anew, and hooks of `in_backward` are taken off.

    Args:
        model: a PeftModel (or any module) with MoE-LoRA or LoRA layers.
        name: "rsgd", "grsgd", "radamw" or "gradamw".
        lr: learning rate of the experts and of other trainable parameters. The paper uses 1e-5 to
            3e-5 with AdamW and 3e-5 with SGD on 3B models.
        gate_lr: learning rate of the gates. The paper's 3e-8 all but freezes the router, so where
            nothing else trains, the default brings a warning.
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
        in_backward: precondition in the backward (`precondition_in_backward`) and step with torch's
            own SGD or AdamW, for engines that flatten parameters (DeepSpeed ZeRO, stage 1 and 2).
            Needs `gate_max_grad_norm=None`, `order="jacobi"` and `bias_correction=True`.
        **base: further options of torch's SGD or AdamW (momentum, fused, foreach, ...).

    Returns:
        A RiemannianSGD or RiemannianAdamW; with `in_backward` a torch SGD or AdamW.

    Raises:
        ConfigError: unknown name (nearest offered), nothing to train, an option out of range, or a
            parallel engine that cannot run it (the message names one that can).
    """
    if name not in OPTIMIZERS:
        raise ConfigError(unknown_name_message("optimizer", name, OPTIMIZERS))
    spec = OPTIMIZERS[name]
    refuse_unsupported_engine(model, in_backward)
    if in_backward:
        _refuse_in_backward(order, gate_max_grad_norm, bias_correction)
    for key, rate in (("lr", lr), ("gate_lr", gate_lr)):
        if not 0 <= rate < math.inf:
            raise ConfigError(f"{key}={rate!r} must be a number of at least 0.")
    check_damping(damping)
    _resolve_gate_rescale(model, name, spec.gate_rescale)
    remove_preconditioning(model)
    groups = parameter_groups(
        model,
        lr=lr,
        gate_lr=gate_lr,
        gate_max_grad_norm=gate_max_grad_norm,
        weight_decay=weight_decay,
    )
    if gate_lr == _GATE_LR and all(group["role"] == GATES for group in groups):
        warnings.warn(
            f"Only routers train, and gate_lr={gate_lr:g}, its default, all but freezes them; set "
            "gate_lr.",
            UserWarning,
            stacklevel=2,
        )
    is_adamw = spec.optimizer is RiemannianAdamW
    if is_adamw:
        base = {"betas": tuple(betas), "eps": eps, **base}
    if in_backward:
        precondition_in_backward(model, damping=damping, scale_compensation=scale_compensation)
        plain = _plain_groups(groups, lora_plus_ratio)
        if not is_adamw:
            return torch.optim.SGD(plain, lr=lr, **base)
        optimizer = torch.optim.AdamW(plain, lr=lr, **base)
        fuse_where_possible(optimizer.param_groups, base)
        return optimizer
    if is_adamw:
        base = {"bias_correction": bias_correction, **base}
    return spec.optimizer(
        groups,
        lr=lr,
        damping=damping,
        order=order,
        scale_compensation=scale_compensation,
        lora_plus_ratio=lora_plus_ratio,
        **base,
    )


def _refuse_in_backward(
    order: str, gate_max_grad_norm: float | None, bias_correction: bool
) -> None:
    """What needs an optimizer of ours."""
    if order != "jacobi":
        raise ConfigError(
            f"order={order!r} needs the optimizer's own step, which in_backward does without; set "
            "order to 'jacobi'."
        )
    if gate_max_grad_norm is not None:
        raise ConfigError(
            f"gate_max_grad_norm={gate_max_grad_norm!r} needs the optimizer's own step, which "
            "in_backward does without; set it to None (in optim_args: gate_max_grad_norm=null)."
        )
    if not bias_correction:
        raise ConfigError(
            "bias_correction=False needs the optimizer's own step, which in_backward does without; "
            "set it to True."
        )


def _plain_groups(groups: list[Group], lora_plus_ratio: float) -> list[Group]:
    """The same groups as torch's own optimizers take them: A and B apart, nothing of ours in it."""
    plain = []
    for group in groups:
        common = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        if group["role"] == EXPERTS:
            pairs = list(factors_of(group))
            rate_b = group["lr"] * lora_plus_ratio
            plain += [
                {**common, "params": [a for a, _ in pairs if a is not None]},
                {**common, "params": [b for _, b in pairs if b is not None], "lr": rate_b},
            ]
        else:
            plain.append({**common, "params": group["params"]})
    return [group for group in plain if group["params"]]


def _resolve_gate_rescale(model: nn.Module, name: str, mode: GateRescale) -> None:
    for adapter, config in active_configs(model).items():
        chosen = config.gate_rescale
        use_gate_rescale(model, mode if chosen == "auto" else cast(GateRescale, chosen), adapter)
        if chosen not in ("auto", mode):
            warnings.warn(
                f"{name} stands for gate_rescale={mode!r}, but adapter {adapter!r} says "
                f"{chosen!r}, which is used.",
                UserWarning,
                stacklevel=3,
            )
