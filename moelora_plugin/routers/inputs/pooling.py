"""One decision per sequence, from features pooled over some of its positions.

Shape suffixes: B sequences, S positions, I in.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ...call import Call
from ...errors import ConfigError
from ...types import Documents, Rows
from .base import RouterInput, by_sequence, spread

_POOLS = ("mean", "max", "first", "last")


class PooledInput(RouterInput):
    """Rows are sequences: x pooled over the positions that `positions` names.

    A generation has one decision for each sequence: it is taken over the prompt, that is all real
    tokens that `generate` was given, and kept with the cache while the cache holds them, so that
    all tokens of an answer have their sequence's experts. Candidates of assisted decoding and
    earlier tokens of the answer (without a cache) have no say. Outside of `generate` the first call
    of a cache shows the prompt. Several generations may take turns. Where the prompt is not seen
    as a whole (it comes in chunks, or continues a cache), the decision cannot be known and is
    refused.

    Of rows that hold several sequences (packing), each sequence has its own decision.

    Args:
        pool: "mean", "max" over the positions by feature, or the "first" or "last" of them.
    """

    decides_over_sequence = True
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
        if (documents := call.documents) is not None:
            return self._rows_of_documents(x_BSI, call, documents)
        if self._begins(call):
            chosen_BS, end = self._in_prompt(x_BSI, call)
            pooled_BI = pooled(x_BSI, chosen_BS, self.pool)
            # No generation follows a training call, nor one of a layer by itself.
            if not call.is_training and call.shape is not None:
                call.kept[self] = pooled_BI.detach(), end
        else:
            pooled_BI = self._kept(call, len(x_BSI)).to(x.dtype)
        sequences, positions = x_BSI.shape[:2]
        return Rows(
            x=pooled_BI,
            batch=sequences,
            row_of_token=spread(sequences, positions, x.device),
        )

    def _in_prompt(self, x_BSI: Tensor, call: Call) -> tuple[Tensor | None, int]:
        """The positions to pool, and how many the cache has to hold for the decision to stand."""
        chosen_BS, positions = self.positions(x_BSI, call), x_BSI.shape[1]
        if call.ends is None:
            return chosen_BS, positions
        if x_BSI.shape[:2] != call.shape:
            raise ConfigError(
                f"router_input={self.key!r} decides by the whole prompt, and in a generation a "
                f"layer sees {tuple(x_BSI.shape[:2])} of its {tuple(call.shape or ())} tokens, as "
                "those of a head do; name the layer in exclude_modules."
            )
        if positions == call.ends:
            return chosen_BS, positions
        if positions < call.ends:
            raise ConfigError(
                f"router_input={self.key!r} decides by the whole prompt, and the model was shown "
                f"{positions} of its {call.ends} tokens first; set prefill_chunk_size to None."
            )
        asked_BS = (torch.arange(positions, device=x_BSI.device) < call.ends).expand(call.shape)
        return asked_BS if chosen_BS is None else chosen_BS & asked_BS, call.ends

    def _rows_of_documents(self, x_BSI: Tensor, call: Call, documents: Documents) -> Rows:
        if x_BSI.shape[:2] != call.shape or not self._begins(call):
            raise ConfigError(
                f"router_input={self.key!r} decides about sequences, and this call packs "
                f"{documents.count} of them into {call.shape and call.shape[0]} rows that a layer "
                "does not see whole (other tokens, or a cache shared by several sequences); do not "
                "pack, or set router_input='token'."
            )
        documents = Documents(documents.count, documents.of_T.to(x_BSI.device))
        chosen_BS = self.positions(x_BSI, call)
        pooled_DI = pooled_documents(x_BSI.flatten(0, 1), chosen_BS, documents, self.pool)
        return Rows(x=pooled_DI, batch=documents.count, row_of_token=documents.of_T)

    def _begins(self, call: Call) -> bool:
        if call.begins is None:
            raise ConfigError(
                f"router_input={self.key!r} cannot tell how much this model's cache holds; call "
                "it with use_cache=False."
            )
        return call.begins

    def _kept(self, call: Call, sequences: int) -> Tensor:
        kept_BI, end = call.kept.get(self, (None, 0))
        if kept_BI is None or len(kept_BI) != sequences:
            raise ConfigError(
                f"router_input={self.key!r} decides when a generation begins, and this cache was "
                f"not begun with this adapter and {sequences} sequences; run the whole prompt "
                "again, or pass use_cache=False."
            )
        if call.held is not None and call.held < end:
            raise ConfigError(
                f"router_input={self.key!r} has decided by {end} tokens, of which this cache holds "
                f"{call.held}; run the whole prompt again, or pass use_cache=False."
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


def pooled_documents(
    x_TI: Tensor, chosen_BS: Tensor | None, documents: Documents, pool: str
) -> Tensor:
    """`pooled` for sequences of different lengths, one after the other: features (D, I)."""
    of_T, count = documents.of_T, documents.count
    index_T = torch.arange(len(of_T), device=of_T.device)
    chosen_T = torch.ones_like(of_T, dtype=torch.bool) if chosen_BS is None else chosen_BS.flatten()
    chosen_T = chosen_T.to(of_T.device)
    has_any_D = of_T[chosen_T].bincount(minlength=count) > 0
    chosen_T = chosen_T | (~has_any_D[of_T] & (index_T == documents.first_D[of_T]))
    if pool in ("first", "last"):
        reduce, beyond = ("amax", -1) if pool == "last" else ("amin", len(of_T))
        places_T = torch.where(chosen_T, index_T, beyond)
        at_D = index_T.new_full((count,), beyond).scatter_reduce(0, of_T, places_T, reduce)
        return x_TI[at_D]
    x_CI, of_C = x_TI[chosen_T], of_T[chosen_T]
    if pool == "max":
        lowest_DI = x_TI.new_full((count, x_TI.shape[1]), -torch.inf)
        return lowest_DI.scatter_reduce(0, of_C.unsqueeze(-1).expand_as(x_CI), x_CI, "amax")
    total_DI = x_TI.new_zeros(count, x_TI.shape[1]).index_add(0, of_C, x_CI)
    return total_DI / of_C.bincount(minlength=count).unsqueeze(-1)
