"""A pool of rank-1 factors a and one of factors b, selected apart.

Shape suffixes: T tokens, I in, O out, E experts, P positions in the order of selection.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..ops.gate_rescale import rescaled_mixture
from ..types import ExpertInput, Gates, LayerPlan
from .base import ExpertKind, Tensors

_SELECTIONS = ("independent", "conditional")


class PoolExperts(ExpertKind):
    """Conditional Mixture-of-LoRA (arXiv 2402.15896): s sum_k v_k b_{j(k)} u_k a_{i(k)}^T x.

    The layer's router decides about the pool of a's: i(k) is its k-th best with gate u_k. A gate of
    the kind's own decides about the b's from the same x: j(k) is its k-th best with the share v_k.
    As many b's are selected as a's; the k-th of one goes with the k-th of the other, as in the
    published code.

        independent:  softmax(G x)
        conditional:  softmax(G x) + condition_weight * sum_k softmax(C_k^T a_{i(k)})

    Both are divided by their sum over the selected b's.

    Not covered, or different: the paper's gates decide once per sequence; here that is so for the
    a's (`router_input="sequence"`), while the b's are selected token by token, since experts see
    tokens. The published code's default uses selected factors without their gates, which leaves
    its router without any gradient; here gates are always in. Its other conditions (task
    embeddings, a's indexes instead of their values) are left out. The own gate trains with the
    experts' learning rate.

    Gate rescaling: a pair is weighed by u_k v_k, and the exponent is on that product. Riemannian
    metric: not defined, since any a can meet any b. `r` must be 1; the number of pairs, the paper's
    r, is top_k, so its scale alpha / r is `lora_alpha` alpha / top_k here.

    Args:
        plan: E factors in each pool.
        in_features: I.
        out_features: O.
        selection: "independent" or "conditional".
        condition_weight: weight of the condition.

    Raises:
        ConfigError: an expert's rank is not 1, or an unknown selection.
    """

    def __init__(
        self,
        plan: LayerPlan,
        in_features: int,
        out_features: int,
        *,
        selection: str = "independent",
        condition_weight: float = 1.0,
    ) -> None:
        super().__init__(plan, in_features, out_features)
        if set(plan.ranks) != {1}:
            raise ConfigError(
                f"expert='pools' has factors of rank 1, not {max(plan.ranks)}; set r to 1."
            )
        if selection not in _SELECTIONS:
            raise ConfigError(
                f"expert_kwargs['selection']={selection!r} must be one of {', '.join(_SELECTIONS)}."
            )
        self.conditional = selection == "conditional"
        self.condition_weight = condition_weight

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A (E, I), B (O, E), gate_B (E, I), and condition (top_k, I, E) where conditional."""
        experts, d_in = self.plan.num_experts, self.in_features
        shapes: dict[str, tuple[int, ...]] = {
            "A": (experts, d_in),
            "B": (self.out_features, experts),
            "gate_B": (experts, d_in),
        }
        if self.conditional:
            shapes["condition"] = (self.plan.top_k, d_in, experts)
        return shapes

    def reset(self, tensors: Tensors) -> None:
        """The gates as torch.nn.Linear draws them, which is the published code's initialisation."""
        nn.init.kaiming_uniform_(tensors["gate_B"], a=math.sqrt(5))
        if self.conditional:
            bound = 1 / math.sqrt(self.plan.top_k * self.in_features)
            nn.init.uniform_(tensors["condition"], -bound, bound)

    def update(self, tensors: Tensors, inputs: ExpertInput, gates: Gates) -> Tensor:
        """Two products of LoRA's size; in between, each token brings its a's to their b's."""
        chosen_TP = _ranking(gates.weights)
        scores_TE = self._scores(tensors, inputs.x, chosen_TP)
        paired_TP = _ranking(scores_TE)
        # As many b's as there are a's, whatever the router selects by.
        selected_TP = gates.weights.gather(-1, chosen_TP) != 0
        shares_TP = scores_TE.gather(-1, paired_TP) * selected_TP
        smallest = torch.finfo(shares_TP.dtype).tiny
        shares_TP = shares_TP / shares_TP.sum(-1, keepdim=True).clamp(min=smallest)

        def mixture(inputs: ExpertInput, tensors: Tensors, weights: list[Tensor]) -> Tensor:
            z_TE = torch.nn.functional.linear(inputs.x, tensors["A"])
            gated_TP = (z_TE * weights[0].to(z_TE.dtype)).gather(-1, chosen_TP)
            h_TP = gated_TP * weights[1].to(z_TE.dtype)
            h_TE = torch.zeros_like(h_TP).scatter(-1, paired_TP, h_TP)
            return torch.nn.functional.linear(h_TE, tensors["B"])

        factors = {"A": tensors["A"], "B": tensors["B"]}
        return rescaled_mixture(mixture, inputs, factors, gates, [shares_TP]) * gates.scaling

    def _scores(self, tensors: Tensors, x_TI: Tensor, chosen_TP: Tensor) -> Tensor:
        """How much each b is wanted (T, E), fp32 or wider."""
        scores_TE = _softmax_wide(torch.nn.functional.linear(x_TI, tensors["gate_B"]))
        if self.conditional:
            # What every a says at every position; each token then reads its own.
            said_EPE = torch.einsum("ai,pie->ape", tensors["A"], tensors["condition"])
            positions_P = torch.arange(self.plan.top_k, device=x_TI.device)
            said_TPE = _softmax_wide(said_EPE)[chosen_TP[:, : self.plan.top_k], positions_P]
            scores_TE = scores_TE + self.condition_weight * said_TPE.sum(1)
        return scores_TE


def _ranking(scores: Tensor) -> Tensor:
    """Indexes of the last dimension, best first; of equals the lower one."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices


def _softmax_wide(logits: Tensor) -> Tensor:
    """Softmax over the last dimension in fp32 or wider."""
    return torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
