"""RiemannianSGD and RiemannianAdamW: torch's own optimizers on preconditioned gradients.

The step itself, its fused and foreach paths and its state are torch's; only the gradients it sees
differ. They are put back afterwards, so nothing is preconditioned twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ops.precondition import damped_inverses, metric_of, precondition
from .groups import EXPERTS, GATES, FrozenFactor, Group, factors_of, take_frozen
from .sharded import sharded_like, whole

ORDERS = ("jacobi", "gauss_seidel")

# torch's AdamW divides by 1 - beta^step. Counting from here both corrections are exactly 1 in
# floating point (0.99999^(2^23) is 3e-37), so the stock kernels, fused ones too, run without bias
# correction; fp32 counts another eight million steps exactly.
_STEP_WITHOUT_BIAS_CORRECTION = 2.0**23


def check_damping(damping: float) -> None:
    """Refuse a negative damping.

    Raises:
        ConfigError: it is negative.
    """
    if damping < 0:
        raise ConfigError(f"damping={damping!r} must not be negative.")


def warn_of_escalation(escalated: int, damping: float) -> None:
    """Say how many metrics needed more damping than asked for."""
    if escalated:
        warnings.warn(
            f"{escalated} expert metric(s) were too ill-conditioned for damping={damping:g} and "
            "got more in this step; raise damping if this persists.",
            RuntimeWarning,
            stacklevel=3,
        )


def _num_factors(group: Group) -> int:
    """How many parameters its pairs have."""
    return sum(1 if frozen != "none" else 2 for frozen in group["frozen"])


def _refuse_flattened(group: Group) -> None:
    if len(group["params"]) != _num_factors(group) or any(p.ndim != 2 for p in group["params"]):
        raise ConfigError(
            "The engine has flattened the experts' factors, so they have no Riemannian metrics; "
            "under DeepSpeed ZeRO stage 1 or 2 use build_optimizer(..., in_backward=True), and "
            "FSDP2 in place of FSDP version 1."
        )


class _Riemannian(torch.optim.Optimizer):
    """Preconditions the pairs of every `experts` group, clips every `gates` group, then steps.

    Groups are those of `optim.groups.parameter_groups`.
    """

    # For each experts group, by its place among them, the frozen factor of each pair.
    _frozen_factors: list[list[FrozenFactor | None]]

    def _add_defaults(self, **options: Any) -> None:
        """Give every group our options, as torch's own constructors do with theirs."""
        self.defaults.update(options)
        for group in self.param_groups:
            for key, value in options.items():
                group.setdefault(key, value)
        # The fused kernels would take still scaled gradients from a GradScaler; the metrics and the
        # clipping need them unscaled, which is what the scaler does for optimizers that do not
        # claim this.
        self._step_supports_amp_scaling = False
        self._frozen_factors = [take_frozen(group) for group in self._expert_groups()]
        self._check_groups()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_frozen_factors": self._frozen_factors}

    def _check_groups(self) -> None:
        for group in self.param_groups:
            if group["order"] not in ORDERS:
                raise ConfigError(f"order={group['order']!r} must be one of {', '.join(ORDERS)}.")
            check_damping(group["damping"])
            if group.get("role") == EXPERTS and len(group["params"]) != _num_factors(group):
                raise ConfigError(
                    f"An experts group holds {len(group['params'])} parameters for "
                    f"{len(group['ranks'])} pairs; pass the groups of "
                    "optim.groups.parameter_groups unchanged."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the preconditioned gradients.

        Pairs of which one gradient is None are preconditioned on the other alone.

        Args:
            closure: evaluated once, before anything is preconditioned.

        Returns:
            What the closure returned, else None.
        """
        for group in self._expert_groups():
            _refuse_flattened(group)  # engines replace parameters after the constructor
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._original_gradients_kept():
            self._clip_gates()
            if self._steps_a_and_b_apart():
                self._step_a_then_b()
            else:
                self._precondition(("a", "b"))
                super().step()
        return loss

    @contextmanager
    def _original_gradients_kept(self) -> Iterator[None]:
        kept = [(p, p.grad) for group in self.param_groups for p in group["params"]]
        try:
            yield
        finally:
            for parameter, grad in kept:
                parameter.grad = grad

    def _expert_groups(self) -> list[Group]:
        return [group for group in self.param_groups if group.get("role") == EXPERTS]

    def _clip_gates(self) -> None:
        """Clip the joint norm of each gates group (arXiv 2502.15828, section 4.1: 1.0)."""
        for group in self.param_groups:
            limit = group.get("max_grad_norm")
            grads = [p.grad for p in group["params"] if p.grad is not None]
            if group.get("role") != GATES or limit is None or not grads:
                continue
            norm = torch.nn.utils.get_total_norm(grads)
            # The same coefficient as torch.nn.utils.clip_grad_norm_, not in place: the caller keeps
            # its gradients.
            scale = (limit / (norm + 1e-6)).clamp(max=1.0)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad = parameter.grad * scale.to(
                        parameter.grad.device, parameter.grad.dtype
                    )

    def _steps_a_and_b_apart(self) -> bool:
        return any(
            group["order"] == "gauss_seidel" or group["lora_plus_ratio"] != 1.0
            for group in self._expert_groups()
        )

    def _step_a_then_b(self) -> None:
        """Two stock steps: first A and everything that is not an expert, then B.

        Under gauss_seidel B's metric is taken from the A that has just moved. torch skips
        parameters without a gradient, so each is stepped once.
        """
        jacobi = [group for group in self._expert_groups() if group["order"] == "jacobi"]
        gauss_seidel = [
            group for group in self._expert_groups() if group["order"] == "gauss_seidel"
        ]
        self._precondition(("a", "b"), jacobi)
        self._precondition(("a",), gauss_seidel)
        waiting = [
            (b, b.grad)
            for group in self._expert_groups()
            for _, b in factors_of(group)
            if b is not None
        ]
        for b, _ in waiting:
            b.grad = None
        super().step()

        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        for b, grad in waiting:
            b.grad = grad
        self._precondition(("b",), gauss_seidel)
        rates = [(group, group["lr"]) for group in self._expert_groups()]
        try:
            for group, lr in rates:
                group["lr"] = lr * group["lora_plus_ratio"]
            super().step()
        finally:
            for group, lr in rates:
                group["lr"] = lr

    def _precondition(self, sides: Iterable[str], groups: list[Group] | None = None) -> None:
        """Replace the gradients of A and/or B by their preconditioned ones."""
        for group, frozen in zip(self._expert_groups(), self._frozen_factors, strict=True):
            if groups is None or any(group is one for one in groups):
                for side in sides:
                    self._precondition_side(group, frozen, side)

    def _precondition_side(
        self, group: Group, frozen: list[FrozenFactor | None], side: str
    ) -> None:
        learners: list[tuple[int, Tensor, Tensor]] = []
        metrics = []
        for i, (a, b) in enumerate(factors_of(group)):
            # A's gradient is measured by B's metric and the other way round.
            learner, partner = (a, b) if side == "a" else (b, a)
            if learner is None or learner.grad is None:
                continue
            buffer = frozen[i]
            factor = partner if buffer is None else buffer()
            assert factor is not None
            learners.append((i, learner, learner.grad))
            metrics.append(
                metric_of(whole(factor.detach()), side, group["ranks"][i], group["shared"][i])
            )
        inverses, escalated = damped_inverses(metrics, group["damping"])
        warn_of_escalation(escalated, group["damping"])
        for (i, parameter, grad), inverse in zip(learners, inverses, strict=True):
            if group["scale_compensation"]:
                inverse = inverse / group["scalings"][i] ** 2
            preconditioned = precondition(
                inverse, whole(grad), side, group["ranks"][i], group["shared"][i]
            )
            parameter.grad = sharded_like(preconditioned, grad)


class RiemannianSGD(_Riemannian, torch.optim.SGD):
    """RSGD, and gRSGD with a rescaled adapter: torch's SGD on preconditioned gradients.

    X moves by -lr s^2 g^(1+p) times the projections of the full gradient onto col(B_i) and row(A_i)
    (arXiv 2502.15828, eq. 9 to 12, counting s and the forward's g).

    Args:
        params: groups of `optim.groups.parameter_groups`; `build_optimizer` makes them.
        lr: step per update, dimensionless: the preconditioned gradient is in units of X.
        damping: added to the metrics' diagonal, in the unit of squared factor entries.
        order: "jacobi" (A and B from the old values, eq. 6) or "gauss_seidel" (B's metric from the
            new A).
        scale_compensation: divide the preconditioned gradients by s^2.
        lora_plus_ratio: B's learning rate over A's (LoRA+).
        **sgd: torch.optim.SGD's own options (momentum, weight_decay, fused, ...).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 3e-5,
        *,
        damping: float = 1e-6,
        order: str = "jacobi",
        scale_compensation: bool = False,
        lora_plus_ratio: float = 1.0,
        **sgd: Any,
    ) -> None:
        super().__init__(params, lr=lr, **sgd)
        self._add_defaults(
            damping=damping,
            order=order,
            scale_compensation=scale_compensation,
            lora_plus_ratio=lora_plus_ratio,
        )


class RiemannianAdamW(_Riemannian, torch.optim.AdamW):
    """RAdamW, and gRAdamW with a rescaled adapter: torch's AdamW on preconditioned gradients.

    The preconditioned gradient feeds both moments. Decoupled weight decay acts on the parameters as
    in AdamW.

    Args:
        params: groups of `optim.groups.parameter_groups`; `build_optimizer` makes them.
        lr: step per update; AdamW moves each entry by about lr.
        damping: added to the metrics' diagonal, in the unit of squared factor entries.
        order: "jacobi" (A and B from the old values, eq. 6) or "gauss_seidel" (B's metric from the
            new A).
        bias_correction: False reproduces the reference code, whose first step is about sqrt(1 / (1
            - beta2)) times (1 - beta1) as long, that is 3.16 lr. The state's `step` then counts
            from 2^23.
        scale_compensation: divide the preconditioned gradients by s^2; AdamW's normalisation makes
            this matter only through eps.
        lora_plus_ratio: B's learning rate over A's (LoRA+).
        **adamw: torch.optim.AdamW's own options (betas, eps, weight_decay, fused, ...).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-5,
        *,
        damping: float = 1e-6,
        order: str = "jacobi",
        bias_correction: bool = True,
        scale_compensation: bool = False,
        lora_plus_ratio: float = 1.0,
        **adamw: Any,
    ) -> None:
        super().__init__(params, lr=lr, **adamw)
        self._add_defaults(
            damping=damping,
            order=order,
            scale_compensation=scale_compensation,
            lora_plus_ratio=lora_plus_ratio,
            bias_correction=bias_correction,
        )

    def _init_group(self, group: Group, *args: Any, **kwargs: Any) -> Any:
        """Torch's own state; without bias correction its step counter starts where both are 1."""
        fresh = [p for p in group["params"] if p.grad is not None and not self.state.get(p)]
        result = super()._init_group(group, *args, **kwargs)  # type: ignore[no-untyped-call]
        if not group["bias_correction"]:
            for parameter in fresh:
                self.state[parameter]["step"].add_(_STEP_WITHOUT_BIAS_CORRECTION)
        return result
