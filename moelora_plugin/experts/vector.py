"""Experts that rescale the base's output features, (IA)^3-style.

Shape suffixes: T tokens, O out, E experts.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import ExportError
from ..ops.gate_rescale import rescaled_mixture
from ..types import ExpertInput, Gates
from .base import ExpertKind, Tensors


class VectorExperts(ExpertKind):
    """E_i(x) = s d_i * base(x) (MoV, arXiv 2309.05444): y = (1 + s sum_i g_i d_i) * base(x).

    The paper mixes vectors l_i = 1 + d_i that start at one: y = (sum_i g_i l_i) * base(x). With
    gates that sum to 1 and s = 1 (`scale="constant"`, `lora_alpha=1`) that is the same. With other
    gates the paper's update is larger by (sum_i g_i - 1) * base(x), which would change the base's
    output before anything is learned; here the update starts at zero whatever the gates.

    base(x) includes the base's bias, as in (IA)^3, and sees x without `lora_dropout`. There is no
    rank: `r` counts in the scale only.

    Riemannian metric: not defined, since there are no two factors; d trains as an ordinary
    parameter. Not an update of the weight alone, so it does not merge.
    """

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The d_i as rows: (E, O)."""
        return {"vector": (self.plan.num_experts, self.out_features)}

    def reset(self, tensors: Tensors) -> None:
        """Zeros: l_i is one."""
        nn.init.zeros_(tensors["vector"])

    def update(self, tensors: Tensors, inputs: ExpertInput, gates: Gates) -> Tensor:
        """One (T, E) x (E, O) product."""
        return rescaled_mixture(self._mixture, inputs, tensors, gates) * gates.scaling

    def _mixture(self, inputs: ExpertInput, tensors: Tensors, weights: list[Tensor]) -> Tensor:
        vector_EO = tensors["vector"]
        mixed_TO = weights[0].to(vector_EO.dtype) @ vector_EO
        return mixed_TO * inputs.base_output

    def static_update(self, tensors: Tensors, weights_E: Tensor, scaling: float) -> Tensor:
        """Refuse: the update is a multiple of the base's own weight and bias.

        Raises:
            ExportError: always.
        """
        raise ExportError(
            "expert='vector' rescales the base's output, bias included, which adding to the weight "
            "does not give; serve the adapter unmerged."
        )
