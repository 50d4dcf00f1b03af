"""Initial values from the singular value decomposition of the base's weight.

Shape suffixes: I in, O out, R total rank, C singular components of the weight.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..errors import ConfigError
from ..types import LayerPlan
from ..values import MAX_ROUNDS
from .base import Initialization, InitInput


class SvdInitialization(Initialization):
    """Each expert starts as some singular components of W = U diag(S) V^T.

    With S' = S / (s rho) of its components, s being the LoRA scale,

        B_i = U_i sqrt(S'_i)         A_i = sqrt(S'_i) V_i^T         s B_i A_i = U_i S_i V_i^T / rho

    What the experts add at the start is taken out of the base by the offset c s sum_i B_i A_i (see
    `Initialization`). With c = 1 / E the expected output is the base's: gates that sum to 1 are 1/E
    each on average, as long as the router prefers no expert, whether it selects k of them or all.
    With one expert, or equal gates, output and base are equal for every token. Gates with another
    sum (sigmoid, top-k without renormalisation, a universal expert) need their own `init_cof`, and
    experts that mix factors in place of outputs ("mixed_factors") do not start at the base.

    Args:
        rho: divides the singular values, above 0.
        init_cof: c; 1 / E where left out, which is what GOAT's scripts pass.

    Raises:
        ConfigError: a value out of range.
    """

    reads_data = True

    def __init__(self, *, rho: float, init_cof: float | None = None) -> None:
        if not rho > 0:
            raise ConfigError(f"init_kwargs['rho']={rho!r} must be a number above 0.")
        if init_cof is not None and not init_cof >= 0:
            raise ConfigError(f"init_kwargs['init_cof']={init_cof!r} must be at least 0 or null.")
        self.rho = rho
        self.init_cof = init_cof

    def offset_rank(self, plan: LayerPlan) -> int:
        """R: the offset holds all experts."""
        return plan.total_rank

    @abstractmethod
    def components(self, plan: LayerPlan, number: int) -> list[range]:
        """Which of `number` singular components, largest first, each expert starts from."""

    def decompose(self, weight_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """U (O, C), S (C,) and V^T (C, I), the largest singular value first."""
        u_OC, s_C, vt_CI = torch.linalg.svd(weight_OI, full_matrices=False)
        return u_OC, s_C, vt_CI

    def check_experts(self, inputs: InitInput) -> None:
        """Refuse experts that are no A_i (r_i, I) and B_i (O, r_i) of their own alone.

        Raises:
            ConfigError: they share a factor, keep one frozen, work on slices, or have others.
        """
        if not inputs.has_own_factors or set(inputs.tensors) != {"A", "B", "offset_A", "offset_B"}:
            raise ConfigError(
                "This init gives each expert singular components of its own, and this expert kind "
                "has no factors for them, or other tensors beside; set expert to 'lora', or init "
                "to 'kaiming'."
            )

    def __call__(self, inputs: InitInput) -> None:
        """Fill A, B and the offset in place.

        Raises:
            ConfigError: the experts' ranks are more than the weight's, or the base is quantised.
        """
        offset_a, offset_b = inputs.tensors["offset_A"], inputs.tensors["offset_B"]
        if offset_a.is_meta:  # the values come from the adapter's file
            return
        plan = inputs.plan
        width = min(offset_a.shape[1], offset_b.shape[0])
        if plan.total_rank > width:
            raise ConfigError(
                f"{inputs.module_name} has {width} singular components, fewer than the experts' "
                f"total rank {plan.total_rank}; lower r or num_experts."
            )
        chosen = self.components(plan, width)
        u_OC, s_C, vt_CI = self.decompose(inputs.base_weight(), plan.total_rank)
        for (a_rI, b_Or), which in zip(inputs.experts, chosen, strict=True):
            block = slice(which.start, which.stop)
            root_r = (s_C[block] / (inputs.scaling * self.rho)).sqrt()
            a_rI.copy_(root_r.unsqueeze(1) * vt_CI[block])
            b_Or.copy_(u_OC[:, block] * root_r)
        factor = 1 / plan.num_experts if self.init_cof is None else self.init_cof
        offset_a.copy_(torch.cat([a_rI for a_rI, _ in inputs.experts]))
        offset_b.copy_(torch.cat([b_Or for _, b_Or in inputs.experts], 1))
        offset_b.mul_(factor * inputs.scaling)


class Pissa(SvdInitialization):
    """The largest components, split over the experts in order     (PiSSA, arXiv 2404.02948).

    Args:
        rho: divides the singular values; PiSSA has 1.
        init_cof: how much of the experts is taken out of the base; 1 / E where left out.
        niter: iterations of the randomised SVD (`torch.svd_lowrank`), which computes no more than
            the R components that are needed and draws from torch's random numbers; the full SVD
            where left out. PEFT's `pissa_niter_16` is 16.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self, *, rho: float = 1.0, init_cof: float | None = None, niter: int | None = None
    ) -> None:
        super().__init__(rho=rho, init_cof=init_cof)
        if niter is not None and not niter >= 1:
            raise ConfigError(f"init_kwargs['niter']={niter!r} must be at least 1 or null.")
        if niter is not None and niter > MAX_ROUNDS:
            raise ConfigError(f"init_kwargs['niter']={niter} must not be more than {MAX_ROUNDS:,}.")
        self.niter = niter

    def components(self, plan: LayerPlan, number: int) -> list[range]:
        """The first of all, one expert after the other."""
        return _consecutive(plan.ranks, 0)

    def decompose(self, weight_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Whole, or the first `rank` components by iteration."""
        if self.niter is None:
            return super().decompose(weight_OI, rank)
        u_OR, s_R, v_IR = torch.svd_lowrank(weight_OI, q=rank, niter=self.niter)
        return u_OR, s_R, v_IR.T


class Milora(SvdInitialization):
    """The smallest components, split over the experts in order     (MiLoRA, arXiv 2406.09044).

    Args:
        rho: divides the singular values; MiLoRA has 1.
        init_cof: how much of the experts is taken out of the base; 1 / E where left out.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(self, *, rho: float = 1.0, init_cof: float | None = None) -> None:
        super().__init__(rho=rho, init_cof=init_cof)

    def components(self, plan: LayerPlan, number: int) -> list[range]:
        """The last of all, one expert after the other."""
        return _consecutive(plan.ranks, number - plan.total_rank)


class Segments(SvdInitialization):
    """Each expert a stretch of the spectrum     (GOAT, arXiv 2502.16894).

    The spectrum is cut into E segments of equal length, the largest components first, and expert i
    takes the first r_i components of segment i.

    Args:
        rho: divides the singular values; 10 in GOAT's code.
        init_cof: how much of the experts is taken out of the base; 1 / E where left out.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(self, *, rho: float = 10.0, init_cof: float | None = None) -> None:
        super().__init__(rho=rho, init_cof=init_cof)

    def components(self, plan: LayerPlan, number: int) -> list[range]:
        """The beginnings of the segments.

        Raises:
            ConfigError: an expert's rank is more than a segment's length.
        """
        length = number // plan.num_experts
        if max(plan.ranks) > length:
            raise ConfigError(
                f"init='segments' gives each of {plan.num_experts} experts {length} of {number} "
                f"singular components, fewer than the rank {max(plan.ranks)}; lower r or "
                "num_experts."
            )
        return [range(i * length, i * length + rank) for i, rank in enumerate(plan.ranks)]


def _consecutive(ranks: Sequence[int], start: int) -> list[range]:
    stops = accumulate(ranks, initial=start)
    return [range(at, at + rank) for at, rank in zip(stops, ranks, strict=False)]
