"""One decision per sequence, from features pooled over some of its positions.

Shape suffixes: B sequences, S positions, I in.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ...call import Call
from ...errors import ConfigError
from ...types import Rows
from .base import RouterInput, by_sequence, spread

_POOLS = ("mean", "max", "first", "last")


class PooledInput(RouterInput):
    """Rows are sequences: x pooled over the positions that `positions` names.

    With a cache the decision is taken at the first call of the generation and reused while the
    cache holds a past, so that all tokens of an answer have their sequence's experts. It is kept
    with the cache: several generations may take turns.

    Args:
        pool: "mean", "max" over the positions by feature, or the "first" or "last" of them.
    """

    key: str

    def __init__(self, *, pool: str = "mean") -> None:
        if pool not in _POOLS:
            raise ConfigError(
                f"router_input_kwargs['pool']={pool!r} must be one of "
                f"{', '.join(map(repr, _POOLS))}."
            )
        self.pool = pool

    @abstractmethod
    def positions(self, x_BSI: Tensor, call: Call) -> Tensor | None:
        """True where a position is pooled (B, S); None pools all."""

    def rows(self, x: Tensor, call: Call) -> Rows:
        """One row per sequence.

        Raises:
            ConfigError: tokens that are no sequences, or a cache whose beginning was not seen.
        """
        x_BSI = by_sequence(x, call, self.key)
        if self._begins(call):
            pooled_BI = pooled(x_BSI, self.positions(x_BSI, call), self.pool)
            if not call.is_training:  # no generation follows a training call
                call.kept[self] = pooled_BI.detach()
        else:
            pooled_BI = self._kept(call, len(x_BSI)).to(x.dtype)
        sequences, positions = x_BSI.shape[:2]
        return Rows(
            x=pooled_BI,
            batch=sequences,
            row_of_token=spread(sequences, positions, x.device),
        )

    def _begins(self, call: Call) -> bool:
        if call.begins is None:
            raise ConfigError(
                f"router_input={self.key!r} cannot tell how much this model's cache holds; call "
                "it with use_cache=False."
            )
        return call.begins

    def _kept(self, call: Call, sequences: int) -> Tensor:
        kept_BI = call.kept.get(self)
        if kept_BI is None or len(kept_BI) != sequences:
            raise ConfigError(
                f"router_input={self.key!r} decides when a generation begins, and this cache was "
                f"not begun with this adapter and {sequences} sequences; run the whole prompt "
                "again, or pass use_cache=False."
            )
        return kept_BI


def pooled(x_BSI: Tensor, chosen_BS: Tensor | None, pool: str) -> Tensor:
    """Features (B, I) of the chosen positions; those of position 0 where none is chosen."""
    if chosen_BS is None:
        chosen_BS = torch.ones(x_BSI.shape[:2], dtype=torch.bool, device=x_BSI.device)
    positions_S = torch.arange(x_BSI.shape[1], device=x_BSI.device)
    chosen_BS = chosen_BS | (~chosen_BS.any(1, keepdim=True) & (positions_S == 0))
    if pool in ("first", "last"):
        # Of equal values argmax may give any, so each position gets one of its own.
        order_S = positions_S + 1 if pool == "last" else positions_S.flip(0) + 1
        index_B = (chosen_BS * order_S).argmax(1)
        return x_BSI[torch.arange(len(x_BSI), device=x_BSI.device), index_B]
    # Filled, not multiplied: what stands at a padded position may be infinite.
    if pool == "max":
        return x_BSI.masked_fill(~chosen_BS.unsqueeze(-1), -torch.inf).amax(1)
    total_BI = x_BSI.masked_fill(~chosen_BS.unsqueeze(-1), 0).sum(1)
    return total_BI / chosen_BS.sum(1, keepdim=True)
