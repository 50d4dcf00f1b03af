"""Mini-LoRAs on disjoint slices of the input and of the output.

Shape suffixes: T tokens, I in, O out, E experts, R total rank; i = I / E and o = O / E are one
expert's slices; r is one expert's rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ops.gate_rescale import rescaled_mixture
from ..types import ExpertInput, ExpertPair, Gates, LayerPlan
from .base import ExpertKind, Tensors


class BlockDiagonalExperts(ExpertKind):
    """Expert j maps the j-th slice of x to the j-th slice of y: s B_j A_j x_j (MELoRA, 2402.17263).

    The paper has no router: give every expert the gate 1. With a router, expert j's slice is
    weighed by g_j. Together the experts are one LoRA of rank R whose A and B are block-diagonal,
    with E times fewer parameters. A and B are stacked as PEFT's BdLora stacks one block-diagonal
    factor; there only A or only B has blocks, here both have.

    Riemannian metrics: those of each mini-LoRA on its slices.

    Args:
        plan: the layer's experts.
        in_features: I.
        out_features: O.

    Raises:
        ConfigError: the number of experts does not divide I and O.
    """

    def __init__(self, plan: LayerPlan, in_features: int, out_features: int) -> None:
        super().__init__(plan, in_features, out_features)
        self.rank = self.uniform_rank()
        experts = plan.num_experts
        for width in (in_features, out_features):
            if width % experts:
                raise ConfigError(
                    f"num_experts={experts} does not divide the width {width} of a target module "
                    "into slices; change num_experts (with universal_expert it is one more), or "
                    "take the module out of target_modules."
                )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A is (R, i), B is (o, R)."""
        experts, rank = self.plan.num_experts, self.plan.total_rank
        return {
            "A": (rank, self.in_features // experts),
            "B": (self.out_features // experts, rank),
        }

    def update(self, tensors: Tensors, inputs: ExpertInput, gates: Gates) -> Tensor:
        """Two batched products."""
        return rescaled_mixture(self._mixture, inputs, tensors, gates) * gates.scaling

    def _mixture(self, inputs: ExpertInput, tensors: Tensors, weights: list[Tensor]) -> Tensor:
        experts = self.plan.num_experts
        x_TEi = inputs.x.unflatten(-1, (experts, -1))
        a_Eri = tensors["A"].unflatten(0, (experts, -1))
        b_oEr = tensors["B"].unflatten(1, (experts, -1))
        z_TEr = torch.einsum("tei,eri->ter", x_TEi, a_Eri)
        y_TEo = torch.einsum("ter,oer->teo", z_TEr, b_oEr)
        return (y_TEo * weights[0].to(y_TEo.dtype).unsqueeze(-1)).flatten(1)

    def split(self, tensors: Tensors) -> list[tuple[Tensor, Tensor]]:
        """Views (A_j (r, i), B_j (o, r)), on the j-th slices."""
        return list(
            zip(tensors["A"].split(self.rank), tensors["B"].split(self.rank, 1), strict=True)
        )

    def static_update(self, tensors: Tensors, weights_E: Tensor, scaling: float) -> Tensor:
        """S times the block-diagonal of g_j B_j A_j."""
        gated = zip(weights_E, self.split(tensors), strict=True)
        blocks = [gate.to(b.dtype) * (b @ a) for gate, (a, b) in gated]
        update_OI: Tensor = torch.block_diag(*blocks) * scaling
        return update_OI

    def pairs(self, tensors: Tensors, scaling: float) -> list[ExpertPair]:
        """One pair, with one metric per expert."""
        return [ExpertPair(tensors["A"], tensors["B"], self.plan.ranks, scaling)]
