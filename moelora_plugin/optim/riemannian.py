"""RiemannianSGD and RiemannianAdamW: torch's own optimizers on preconditioned gradients.

The step itself, its fused and foreach paths and its state are torch's; only the gradients it sees
differ. They are put back afterwards, so nothing is preconditioned twice.

All metrics of a model are inverted in one call per size. Then torch steps a portion of the experts
after the other, so that only a portion's preconditioned gradients exist at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ops.precondition import damped_inverses, metric_of, precondition
from ..ops.sharded import sharded_like, whole
from ..types import Shared
from .groups import (
    EXPERTS,
    GATES,
    FrozenFactor,
    Group,
    Name,
    factors_of,
    take_frozen,
    take_names,
)
from .resumed import refuse_other_options

ORDERS = ("jacobi", "gauss_seidel")

# torch's AdamW divides by 1 - beta^step. Counting from here both corrections are exactly 1 in
# floating point (0.99999^(2^23) is 3e-37), so the stock kernels, fused ones too, run without bias
# correction; fp32 counts another eight million steps exactly.
_STEP_WITHOUT_BIAS_CORRECTION = 2.0**23

# Devices with a fused AdamW in every torch that we support.
_FUSED = ("cpu", "cuda", "xpu")

# Bytes of preconditioned gradients at a time. On a CPU they stay in the cache until torch reads
# them, and their memory serves the next portion; elsewhere each portion costs kernel launches.
_PORTION_BYTES = {"cpu": 3 * 2**18}
_PORTION_BYTES_ELSEWHERE = 2**26


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


def fuse_where_possible(groups: list[Group], options: Mapping[str, Any]) -> None:
    """Let AdamW take its one pass over a tensor in place of a dozen, unless somebody chose.

    torch's own default is `foreach` on accelerators and a loop of single operations on a CPU.

    Args:
        groups: of an AdamW; one whose tensors have no fused kernel, or whose own dict chose
            `foreach`, is left as it is.
        options: what its constructor was given.
    """
    if not options.keys().isdisjoint({"fused", "foreach", "differentiable"}):
        return
    for group in groups:
        if not group["foreach"] and all(
            p.is_floating_point() and p.device.type in _FUSED for p in group["params"]
        ):
            group["fused"] = True


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


class _Learner(NamedTuple):
    """A factor that has a gradient, and what that is multiplied by."""

    parameter: Tensor
    inverse: Tensor
    side: str
    ranks: Sequence[int]
    shared: Shared

    def gradient(self) -> Tensor:
        """Its preconditioned gradient, sharded as the gradient itself."""
        grad = self.parameter.grad
        assert grad is not None
        result = precondition(self.inverse, whole(grad), self.side, self.ranks, self.shared)
        return sharded_like(result, grad)


@contextmanager
def _gradients(replaced: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Other gradients for a while, given by parameter."""
    originals = [parameter.grad for parameter, _ in replaced]
    try:
        for parameter, grad in replaced:
            parameter.grad = grad
        yield
    finally:
        for (parameter, _), original in zip(replaced, originals, strict=True):
            parameter.grad = original


def _portions(learners: Iterable[_Learner]) -> Iterator[list[_Learner]]:
    """Neighbours whose gradients take no more than a portion's bytes, one of them at the least."""
    portion: list[_Learner] = []
    room = 0
    for learner in learners:
        size = learner.parameter.numel() * learner.parameter.element_size()
        if portion and size > room:
            yield portion
            portion = []
        if not portion:
            device = learner.parameter.device.type
            room = _PORTION_BYTES.get(device, _PORTION_BYTES_ELSEWHERE)
        portion.append(learner)
        room -= size
    if portion:
        yield portion


def _norm(group: Group) -> Tensor | None:
    """The joint norm of a group's gradients; None where it has none."""
    grads = [p.grad for p in group["params"] if p.grad is not None]
    return whole(torch.nn.utils.get_total_norm(grads)) if grads else None


class _Riemannian(torch.optim.Optimizer):
    """Preconditions the pairs of every `experts` group, clips every `gates` group, then steps.

    Groups are those of `optim.groups.parameter_groups`.
    """

    # For each experts group, by its place among them, the frozen factor of each pair.
    _frozen_factors: list[list[FrozenFactor | None]]
    # For each group, what its parameters are called.
    _names: list[list[Name]]

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
        self._names = [take_names(group) for group in self.param_groups]
        self._check_groups()

    def __getstate__(self) -> dict[str, Any]:
        own = {"_frozen_factors": self._frozen_factors, "_names": self._names}
        return {**super().__getstate__(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the state of a run with the same optimizer.

        Raises:
            ConfigError: it is another's, or was made with other options.
        """
        refuse_other_options(self.param_groups, state_dict["param_groups"])
        super().load_state_dict(state_dict)

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

        Raises:
            FloatingPointError: a gradient or an expert's weights hold NaN or infinity; nothing has
                moved. A loss scaler, whose scaled gradients may, does not come here then.
        """
        for group in self._expert_groups():
            _refuse_flattened(group)  # engines replace parameters after the constructor
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        norms = [_norm(group) for group in self.param_groups]
        experts = list(zip(self._expert_groups(), self._frozen_factors, strict=True))
        # Whatever is wrong with a metric shows before anything has moved.
        learners = [
            self._learners(group, frozen, ("a", "b") if group["order"] == "jacobi" else ("a",))
            for group, frozen in experts
        ]
        # Last, since an accelerator has been waited for by now.
        if not all(norm is None or bool(norm.isfinite()) for norm in norms):
            self._refuse_not_finite()
        with _gradients(self._clipped_gates(norms)):
            self._torch_step([g for g in self.param_groups if g.get("role") != EXPERTS])
        for (group, _), mine in zip(experts, learners, strict=True):
            self._step_learners(group, mine)
        for group, frozen in experts:
            if group["order"] == "gauss_seidel":
                # B's metric is taken from the A that has just moved.
                self._step_learners(group, self._learners(group, frozen, ("b",)))
        return loss

    def _expert_groups(self) -> list[Group]:
        return [group for group in self.param_groups if group.get("role") == EXPERTS]

    def _refuse_not_finite(self) -> None:
        """Name the gradient that is not finite; a norm alone may overflow.

        Of several the one nearest to the model's end: a backward spreads NaN towards the beginning.
        """
        found = [
            name
            for group, names in zip(self.param_groups, self._names, strict=False)
            for parameter, name in zip(group["params"], names, strict=False)
            if parameter.grad is not None and not bool(whole(parameter.grad.isfinite().all()))
        ]
        if found:
            _, name = max(found)
            others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise FloatingPointError(
                f"The gradient of {name}{others} is NaN or infinite, so this step was not taken; "
                "lower the learning rate (lr), or train in a wider dtype."
            )

    def _clipped_gates(self, norms: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
        """Gradients of each gates group at no more than its norm (arXiv 2502.15828, 4.1: 1.0)."""
        clipped = []
        for group, norm in zip(self.param_groups, norms, strict=True):
            limit = group.get("max_grad_norm")
            if group.get("role") != GATES or limit is None or norm is None:
                continue
            # The same coefficient as torch.nn.utils.clip_grad_norm_, not in place: the caller keeps
            # its gradients.
            scale = (limit / (norm + 1e-6)).clamp(max=1.0)
            clipped += [
                (p, p.grad * scale.to(p.grad.device, p.grad.dtype))
                for p in group["params"]
                if p.grad is not None
            ]
        return clipped

    def _learners(
        self, group: Group, frozen: list[FrozenFactor | None], sides: Sequence[str]
    ) -> list[_Learner]:
        """The factors of these sides that have gradients, side by side, with inverse metrics."""
        found = []
        metrics = []
        for side in sides:
            for i, (a, b) in enumerate(factors_of(group)):
                # A's gradient is measured by B's metric and the other way round.
                learner, partner = (a, b) if side == "a" else (b, a)
                if learner is None or learner.grad is None:
                    continue
                constant = frozen[i]
                factor = partner if constant is None else constant()
                assert factor is not None
                ranks, shared = group["ranks"][i], group["shared"][i]
                found.append((i, learner, side, ranks, shared))
                metrics.append(metric_of(whole(factor.detach()), side, ranks, shared))
        try:
            inverses, escalated = damped_inverses(metrics, group["damping"])
        except FloatingPointError as error:
            raise self._not_finite(group, metrics, found, error) from error
        warn_of_escalation(escalated, group["damping"])
        if group["scale_compensation"]:
            inverses = [
                inverse / group["scalings"][i] ** 2
                for (i, *_), inverse in zip(found, inverses, strict=True)
            ]
        return [
            _Learner(learner, inverse, side, ranks, shared)
            for (_, learner, side, ranks, shared), inverse in zip(found, inverses, strict=True)
        ]

    def _not_finite(
        self, group: Group, metrics: Sequence[Tensor], found: Sequence[Any], error: Exception
    ) -> Exception:
        """The same error with the name of a factor whose partner broke its metric."""
        places = {id(p): i for i, p in enumerate(group["params"])}
        mine = next(g for g, other in enumerate(self.param_groups) if other is group)
        for (_, learner, *_), metric in zip(found, metrics, strict=True):
            if not bool(metric.isfinite().all()):
                _, name = self._names[mine][places[id(learner)]]
                return FloatingPointError(f"{error} Its pair is that of {name}.")
        return error

    def _step_learners(self, group: Group, learners: list[_Learner]) -> None:
        """One step on the preconditioned gradients, a portion at a time; B at its LoRA+ rate."""
        rates = {"a": group["lr"], "b": group["lr"] * group["lora_plus_ratio"]}
        for side, rate in rates.items():
            for portion in _portions(one for one in learners if one.side == side):
                parameters = [one.parameter for one in portion]
                with _gradients([(one.parameter, one.gradient()) for one in portion]):
                    self._torch_step([{**group, "params": parameters, "lr": rate}])

    def _torch_step(self, groups: list[Group]) -> None:
        """The step of torch on these groups alone."""
        step: Any = super().step
        # torch gives a class's step the step hooks once an object of that class has been made; they
        # run around ours already.
        step = step.__func__
        step = step.__wrapped__ if getattr(step, "hooked", False) else step
        everything = self.param_groups
        self.param_groups = groups
        try:
            step(self)
        finally:
            self.param_groups = everything


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
        **adamw: torch.optim.AdamW's own options (betas, eps, weight_decay, fused, ...). Without a
            choice between foreach, fused and differentiable it is fused where torch has that.
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
        fuse_where_possible(self.param_groups, adamw)
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
