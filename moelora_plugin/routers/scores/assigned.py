"""Every id has its own expert.

Shape suffixes: N rows, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ConfigError
from ...types import Rows
from .base import Score

_SURE = 1e4  # exp(-1e4) is 0 in every dtype, so a softmax gives exactly 1 and 0


class AssignedScore(Score):
    """Expert i for id i, and i for E + i: nothing is learned and nothing is compared.

    ELREA (arXiv 2502.00089) trains one expert on each cluster of prompts; with "cluster" as the
    input and any router over a softmax, each cluster's sequences use and train its expert alone.
    """

    reads_input = False
    reads_ids = True

    def reset_parameters(self) -> None:
        """There are none."""

    def forward(self, rows: Rows, a: Tensor | None) -> Tensor:
        """Logits (N, E) in fp32: large for the id's expert, 0 for the others.

        Raises:
            ConfigError: the rows have no ids.
        """
        if rows.ids is None:
            raise ConfigError(
                "router_score='assigned' reads ids and this router_input gives none; set "
                "router_input to 'task' or 'cluster'."
            )
        experts = self.plan.num_experts
        every_E = torch.arange(experts, device=rows.ids.device)
        return (rows.ids.unsqueeze(-1) % experts == every_E).float() * _SURE
