"""A gate that thinks several times.

Shape suffixes: N rows, I in, E experts, D state, r one expert's rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...errors import ConfigError
from ...types import LayerPlan, Rows
from ...values import MAX_ROUNDS
from .base import Score, require_count, reset_maps, widened, without_autocast


class RecurrentScore(Score):
    """Routing in rounds over a virtual node, after GRAPHMOE (arXiv 2501.07890).

    A virtual node h (D,) is linked to every expert. Each round it asks the experts, hears their mix
    and updates itself as a GRU does:

        h_0 = tanh(P x)
        p_t = softmax(W h_t),  m_t = sum_i p_ti A_i x,  h_{t+1} = GRU(m_t, h_t)     T - 1 times
        logits = W h_T

    so T = 1 is a gate of two layers. In fp32 or wider.

    What the abstract says is a recurrent routing strategy that simulates iterative thinking steps
    and lets information flow among expert nodes, on LoRA experts. It gives no equations: the GRU,
    the virtual node's state, that the message is the mix of the experts' low-rank activations A_i x
    (a score does not see their outputs) and the defaults are ours. Nor are the experts' outputs of
    earlier rounds added to the layer's output.

    Args:
        in_features: I.
        plan: the layer's experts, of one rank.
        rounds: T.
        width: D.

    Raises:
        ConfigError: the experts' ranks differ.
    """

    def __init__(
        self, in_features: int, plan: LayerPlan, *, rounds: int = 3, width: int = 64
    ) -> None:
        super().__init__(in_features, plan)
        require_count("rounds", rounds, MAX_ROUNDS)
        require_count("width", width)
        if not plan.is_uniform:
            raise ConfigError(
                "router_score='recurrent' mixes the experts' activations, which needs one rank for "
                "all experts of a layer; change r or the allocation."
            )
        self.rounds = rounds
        self.projection = nn.Parameter(torch.empty(width, in_features))
        self.weight_message = nn.Parameter(torch.empty(3 * width, plan.ranks[0]))
        self.weight_state = nn.Parameter(torch.empty(3 * width, width))
        self.bias_message = nn.Parameter(torch.empty(3 * width))
        self.bias_state = nn.Parameter(torch.empty(3 * width))
        self.readout = nn.Parameter(torch.empty(plan.num_experts, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Maps as `torch.nn.Linear` draws them, biases zero."""
        reset_maps(self)

    def forward(self, rows: Rows, a: Tensor | None) -> Tensor:
        """Logits (N, E)."""
        activations = torch.stack(self.expert_activations(rows, a), -2)
        state_ND = torch.tanh(linear(self.features(rows), self.projection))
        with without_autocast(state_ND):
            return self._rounds(widened(state_ND), widened(activations))

    def _rounds(self, state_ND: Tensor, activations_NEr: Tensor) -> Tensor:
        readout = self.readout.to(state_ND.dtype)
        for _ in range(self.rounds - 1):
            probs_NE = linear(state_ND, readout).softmax(-1)
            message_Nr = (probs_NE.unsqueeze(-1) * activations_NEr).sum(-2)
            state_ND = self._gru(message_Nr, state_ND)
        return linear(state_ND, readout)

    def _gru(self, message_Nr: Tensor, state_ND: Tensor) -> Tensor:
        """torch.nn.GRUCell's equations; the cell itself takes one dtype only."""
        dtype = state_ND.dtype
        reset_m, update_m, new_m = linear(
            message_Nr, self.weight_message.to(dtype), self.bias_message.to(dtype)
        ).chunk(3, -1)
        reset_h, update_h, new_h = linear(
            state_ND, self.weight_state.to(dtype), self.bias_state.to(dtype)
        ).chunk(3, -1)
        reset_ND = torch.sigmoid(reset_m + reset_h)
        update_ND = torch.sigmoid(update_m + update_h)
        new_ND = torch.tanh(new_m + reset_ND * new_h)
        return new_ND + update_ND * (state_ND - new_ND)
