"""LoRAMoE's localized balancing: experts are balanced within their half, not over both.

Shape suffixes: T tokens, S sequences, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from .base import LossInput, cv_squared, require_option


def localized_cv2(inputs: LossInput, *, delta: float = 0.1) -> Tensor:
    """CV^2 of importances times coefficients     (LoRAMoE, arXiv 2312.09979, as its code has it).

    Q_es is the sum of expert e's gates over the tokens of sequence s. It is multiplied by 1 + delta
    where the expert is of the sequence's type and by 1 - delta elsewhere; the loss is var / mean^2
    over all entries (e, s), var being the sample's variance. It is least (0) where all products are
    equal, so experts of the other type then have (1 + delta) / (1 - delta) times the importance of
    those of the own type; a negative `delta` turns that round.

    The first half of the experts (E // 2) is of type 1, the others are of type 0. A sequence's type
    is its `task_id`; ids other than 1 count as 0. Sequences that are all padding do not count.

    Args:
        inputs: the layer's routing, with `ids["task_id"]` and `batch`.
        delta: how far the two coefficients are from 1, in (-1, 1).

    Raises:
        ConfigError: the call brought no task ids, or `delta` is out of range.
    """
    require_option(-1 < delta < 1, "localized_cv2.delta", delta, "a number between -1 and 1")
    if "task_id" not in inputs.ids:
        raise ConfigError(
            "aux_losses['localized_cv2'] needs the type of each sequence, 0 or 1; give the model's "
            "call a task_id (B,)."
        )
    weights_TE = inputs.routing.weights.to(inputs.routing.probs.dtype)
    real_T = inputs.real
    if real_T is None:
        real_T = torch.ones_like(weights_TE[:, 0], dtype=torch.bool)
    experts = weights_TE.shape[-1]
    weights_TE = weights_TE * real_T.unsqueeze(-1)
    documents = inputs.documents
    if documents is None:
        importance_SE = weights_TE.view(inputs.batch, -1, experts).sum(1)
        has_tokens_S = real_T.view(inputs.batch, -1).any(-1)
        ids_S = inputs.ids["task_id"].view(inputs.batch, -1)[:, 0]
    else:
        importance_SE = weights_TE.new_zeros(documents.count, experts)
        importance_SE = importance_SE.index_add(0, documents.of_T, weights_TE)
        has_tokens_S = documents.of_T[real_T].bincount(minlength=documents.count) > 0
        ids_S = inputs.ids["task_id"][documents.first_D]

    is_type_1_S = ids_S == 1
    in_first_half_E = torch.arange(experts, device=weights_TE.device) < experts // 2
    own_SE = is_type_1_S.unsqueeze(-1) == in_first_half_E
    scaled_SE = importance_SE * (1 + delta * (2 * own_SE.to(importance_SE.dtype) - 1))
    counts_SE = has_tokens_S.unsqueeze(-1).expand_as(scaled_SE)
    return cv_squared(scaled_SE.flatten(), counts_SE.flatten(), correction=1)
