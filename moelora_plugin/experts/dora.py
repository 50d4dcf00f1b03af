"""LoRA experts with DoRA's magnitude, each its own.

Shape suffixes: T tokens, I in, O out, E experts, R total rank; r is one expert's rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..ops.gate_rescale import rescaled_mixture
from ..types import ExpertInput, Gates
from .base import Tensors
from .lora import LoraExperts


class DoraExperts(LoraExperts):
    """Each expert is a whole DoRA (arXiv 2402.09353) of the base's W, less the base's output.

        E_i(x) = (m_i / n_i - 1) * W x + (m_i / n_i) * s B_i A_i x,    n_i = |W + s B_i A_i|, by row

    The norms n_i are constants in the backward, as in section 4.3 of the paper. What is stored is
    `magnitude` = m_i - |W|, zero at first, whose gradient is m_i's own: the base's weight is not
    needed to create or load the adapter. It is needed in every forward, so a quantised base is
    refused. No W + s B_i A_i is formed: the squared norms are |W|^2 + 2 s <W A_i^T, B_i> +
    s^2 <B_i A_i A_i^T, B_i> by row, at the cost of W A^T, which is that of R more tokens through
    the layer.

    With one expert of gate 1 and no dropout this is PEFT's DoRA on a base without bias. Two
    differences: W x comes from the base's output, so a bias is rescaled with it; and it sees x
    without `lora_dropout`, where PEFT drops x in it as well.

    Riemannian metrics: those of the LoRA pairs, a heuristic that leaves out the magnitudes and the
    norms; `magnitude` trains as an ordinary parameter. Merging is refused: the update depends on
    the base's weight.

    Args:
        plan: the layer's experts.
        in_features: I.
        out_features: O.
    """

    sums_outputs = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A (R, I), B (O, R) and magnitude (E, O)."""
        return {**super().shapes(), "magnitude": (self.plan.num_experts, self.out_features)}

    def reset(self, tensors: Tensors) -> None:
        """M_i = |W|."""
        nn.init.zeros_(tensors["magnitude"])

    def _mix(
        self,
        tensors: Tensors,
        inputs: ExpertInput,
        gates: Gates,
        onto_TO: Tensor | None = None,
    ) -> Tensor:
        """The LoRA mixture with rows of B rescaled, and W x by what is left."""
        base_norm_1O, norm_EO = self._norms(tensors, inputs.base_weight(), gates.scaling)
        ratio_EO = (tensors["magnitude"] + base_norm_1O) / norm_EO
        of_base_TO = rescaled_mixture(_of_base, inputs, {"ratio": ratio_EO}, gates)
        ratio_OR = ratio_EO.T[:, self._expert_of_rank(ratio_EO.device)]
        b_OR = (tensors["B"] * ratio_OR).to(tensors["B"].dtype)
        onto_TO = of_base_TO if onto_TO is None else onto_TO + of_base_TO
        return super()._mix({**tensors, "B": b_OR}, inputs, gates, onto_TO)

    @torch.no_grad()
    def _norms(self, tensors: Tensors, weight_OI: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """|W| (1, O) and n (E, O), by row, in W's dtype, which is fp32 or wider."""
        with torch.autocast(weight_OI.device.type, enabled=False):
            # A row that is zero, or that s B_i A_i cancels up to rounding, must not divide by zero.
            smallest = torch.finfo(weight_OI.dtype).tiny
            squares_1O = weight_OI.square().sum(1).clamp(min=smallest).unsqueeze(0)
            squares_EO = []
            for a_rI, b_Or in self.split(tensors):
                a_rI, b_Or = a_rI.to(weight_OI.dtype), b_Or.to(weight_OI.dtype) * scaling
                cross_Or = 2 * (weight_OI @ a_rI.T) + b_Or @ (a_rI @ a_rI.T)
                squares_EO.append(squares_1O[0] + (cross_Or * b_Or).sum(1))
            return squares_1O.sqrt(), torch.stack(squares_EO).clamp(min=smallest).sqrt()

    def static_update(self, tensors: Tensors, weights_E: Tensor, scaling: float) -> Tensor:
        """Refuse.

        Raises:
            ExportError: always.
        """
        raise ExportError(
            "expert='dora' rescales the base's own weight, so an update taken from a merged weight "
            "could not be taken out again; serve the adapter unmerged."
        )


def _of_base(inputs: ExpertInput, tensors: Tensors, weights: list[Tensor]) -> Tensor:
    """sum_i g_i (m_i / n_i - 1) * W x."""
    excess_EO = (tensors["ratio"] - 1).to(inputs.base_output.dtype)
    return (weights[0].to(excess_EO.dtype) @ excess_EO) * inputs.base_output
