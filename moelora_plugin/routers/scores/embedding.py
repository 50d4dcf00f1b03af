"""Gates by task or cluster.

Shape suffixes: N rows, E experts, M ids, D embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...types import LayerPlan, Rows
from .base import Score, require_count, reset_linear

DEFAULT_NUM_IDS = 64


class EmbeddingScore(Score):
    """W e[id] with a learned embedding e (M, D), or a learned row of logits per id.

    MOELoRA-medical (arXiv 2310.18339) has D = 64 and tasks, MoCLE (arXiv 2312.12379) D = 384 and
    M = 64 clusters, Poly (arXiv 2202.13914) no width: its `module_logits` (M, E) are the logits,
    drawn uniformly within 1e-3 as PEFT's Poly draws them.

    Args:
        in_features: I, not read.
        plan: the layer's experts.
        num_ids: M, how many tasks or clusters there are.
        width: D; None for the logits themselves.
        bias: add a bias to W e, zero at first.
    """

    reads_input = False
    reads_ids = True

    def __init__(
        self,
        in_features: int,
        plan: LayerPlan,
        *,
        num_ids: int = DEFAULT_NUM_IDS,
        width: int | None = 64,
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, plan)
        require_count("num_ids", num_ids)
        if width is not None:
            require_count("width", width)
        elif bias:
            raise ConfigError(
                "router_score_kwargs['bias'] needs a width; the logits of each id are free already."
            )
        experts = plan.num_experts
        self.num_ids, self.width = num_ids, width
        self.embedding = nn.Parameter(torch.empty(num_ids, experts if width is None else width))
        self.gate = None if width is None else nn.Parameter(torch.empty(experts, width))
        self.gate_bias = nn.Parameter(torch.empty(experts)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `torch.nn.Embedding` and `torch.nn.Linear` draw theirs; logits within 1e-3."""
        if self.gate is None:
            nn.init.uniform_(self.embedding, -1e-3, 1e-3)
            return
        nn.init.normal_(self.embedding)
        reset_linear(self.gate)
        if self.gate_bias is not None:
            nn.init.zeros_(self.gate_bias)

    def forward(self, rows: Rows, a: Tensor | None) -> Tensor:
        """Logits (N, E).

        Raises:
            ConfigError: the rows have no ids, or one is out of range (checked on a CPU only: an
                accelerator would have to wait for the answer).
        """
        if rows.ids is None:
            raise ConfigError(
                "router_score='embedding' reads ids and this router_input gives none; set "
                "router_input to 'task' or 'cluster'."
            )
        ids_N = rows.ids.to(self.embedding.device)
        if ids_N.device.type == "cpu" and not torch.compiler.is_compiling() and len(ids_N):
            least, most = int(ids_N.min()), int(ids_N.max())
            if least < 0 or most >= self.num_ids:
                raise ConfigError(
                    f"The id {least if least < 0 else most} has no embedding among "
                    f"{self.num_ids}; raise router_score_kwargs['num_ids'] or give ids from 0 to "
                    f"{self.num_ids - 1}."
                )
        found = torch.nn.functional.embedding(ids_N, self.embedding)
        if self.gate is None:
            return found
        return torch.nn.functional.linear(found, self.gate, self.gate_bias)
