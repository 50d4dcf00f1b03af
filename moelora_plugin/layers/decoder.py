"""The mixture of a linear for one token or a few, as generation with a cache asks for it.

Shape suffixes: T tokens, I in, O out, E experts; r is one expert's rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..experts import LoraExperts
from ..routers import TopKRouter
from ..routers.scores import LinearScore

if TYPE_CHECKING:
    from .linear import MoeLoraLinear

# With more tokens the products take longer than what is between them.
_MOST_TOKENS = 16


@dataclass(slots=True)
class Decoder:
    """The same operations and numbers as the layer's own pass, without the Python between them.

    For a token that takes longer than its products. So the commonest adapter has its pass written
    down once more, where nothing is to be learnt, recorded or modified: experts "lora" of one rank,
    a top-k of a linear score of each token.

    Attributes:
        a: holds A.
        b: holds B.
        score: holds the gate.
        router: selects.
        scaling: LoRA scale s.
    """

    a: nn.Module
    b: nn.Module
    score: LinearScore
    router: TopKRouter
    scaling: float

    @classmethod
    def of(cls, layer: MoeLoraLinear, adapter: str) -> Decoder | None:
        """That of a layer's adapter; None for any other than the commonest."""
        mixture, router = layer.moelora_mixture[adapter], layer.part("moelora_router", adapter)
        score = layer.part("moelora_gate", adapter)
        modifiers = layer.part("moelora_modifiers", adapter)
        if (
            type(mixture.experts) is not LoraExperts
            or not mixture.plan.is_uniform
            or mixture.universal != "none"
            or adapter in layer.moelora_extra
            or adapter in layer.moelora_gate_source
            or adapter in layer.moelora_decision
            or not isinstance(router, TopKRouter)
            or not router.is_softmax_of_selected
            or modifiers
            or type(score) is not LinearScore
            or score.bias is not None
            or layer.gate_matrix(adapter) is None
        ):
            return None
        a, b = layer.moelora_A[adapter], layer.moelora_B[adapter]
        return cls(a, b, score, router, mixture.scaling)

    def __call__(self, x: Tensor, onto: Tensor) -> Tensor | None:
        """The update for x (..., in), added to `onto` (..., out), which stays as it is.

        None where x is many tokens or in another dtype than the adapter.
        """
        a: Any = self.a.weight
        in_features = x.shape[-1]
        if (
            x.numel() > _MOST_TOKENS * in_features
            or x.dtype is not a.dtype
            or torch.is_autocast_enabled(x.device.type)
        ):
            return None
        x_TI = x.reshape(-1, in_features)
        weights_TE, _ = self.router.gates_of(linear(x_TI, self.score.weight))
        z_TR = linear(x_TI, a)
        z_TR.view(*weights_TE.shape, -1).mul_(weights_TE.to(a.dtype).unsqueeze(-1))
        b: Any = self.b.weight
        onto_TO = onto.reshape(-1, onto.shape[-1])
        return torch.addmm(onto_TO, z_TR, b.T, alpha=self.scaling).view(onto.shape)
