"""Where one packed sequence ends and the next begins.

Hosts put several short sequences into one row. What says so: position ids that start anew, lengths
for attention without padding (`cu_seq_lens_q`), numbers of documents (`seq_idx`, or an attention
mask that counts instead of being 0 and 1), or a finished mask whose blocks do not see each other.

Shape suffixes: B rows, S positions, P planes of positions (time, height, width).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_LENGTHS = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seq_lens", "cu_seqlens")
_NUMBERS = ("seq_idx", "segment_ids", "document_ids", "sequence_ids")


def document_starts(
    arguments: Mapping[str, Any], shape: tuple[int, int], real_BS: Tensor | None
) -> Tensor | None:
    """True where a further sequence begins within its row (B, S); None where nothing says so.

    Nothing here waits for an accelerator.

    Args:
        arguments: the call's, by name.
        shape: (B, S).
        real_BS: which positions are not padding: sequences begin at real ones.
    """
    if shape[1] < 2:
        return None
    found = [
        starts_BS
        for starts_BS in (
            _by_lengths(arguments, shape),
            *(_by_numbers(arguments.get(name), shape) for name in _NUMBERS),
            _by_mask(arguments.get("attention_mask"), shape),
            _by_positions(arguments.get("position_ids"), shape),
        )
        if starts_BS is not None
    ]
    if not found:
        return None
    starts_BS = found[0]
    for other_BS in found[1:]:
        starts_BS = starts_BS | other_BS.to(starts_BS.device)
    if real_BS is None:
        inner_S = torch.arange(shape[1], device=starts_BS.device) > 0
        return starts_BS & inner_S
    real_BS = real_BS.to(starts_BS.device)
    return starts_BS & real_BS & (real_BS.long().cumsum(1) > 1)


def _by_lengths(arguments: Mapping[str, Any], shape: tuple[int, int]) -> Tensor | None:
    """Bounds [0, n1, n1 + n2, ...] of sequences in the flattened batch."""
    bounds_D = next((v for n in _LENGTHS if isinstance(v := arguments.get(n), Tensor)), None)
    if bounds_D is None or bounds_D.ndim != 1:
        return None
    tokens_T = torch.arange(shape[0] * shape[1], device=bounds_D.device)
    return torch.isin(tokens_T, bounds_D).view(shape)


def _by_numbers(numbers_BS: Any, shape: tuple[int, int]) -> Tensor | None:
    """A number for each token, which changes where a sequence begins."""
    if not isinstance(numbers_BS, Tensor) or numbers_BS.shape != shape:
        return None
    if numbers_BS.is_floating_point() or numbers_BS.dtype == torch.bool:
        return None
    return _with_first(numbers_BS[:, 1:] != numbers_BS[:, :-1])


def _by_mask(mask: Any, shape: tuple[int, int]) -> Tensor | None:
    """A 2-D mask that numbers sequences from 1, or a 4-D one with blocks that see only themselves.

    A 2-D mask with a past is longer than the row, and one of 0 and 1, with holes or without, never
    rises above the 1 that it has had.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 2:
        if mask.shape != shape or mask.is_floating_point() or mask.dtype == torch.bool:
            return None
        highest_BS = mask.cummax(1).values
        return _with_first((mask[:, 1:] > highest_BS[:, :-1]) & (highest_BS[:, :-1] > 0))
    if mask.ndim != 4 or mask.shape[-2:] != (shape[1], shape[1]):
        return None
    seen = mask[:, 0].diagonal(-1, -2, -1)  # whether each position sees the one before it
    own = mask[:, 0].diagonal(0, -2, -1)[:, 1:]
    if mask.is_floating_point():
        seen, own = seen == 0, own == 0
    apart_BS = ~seen.bool() & own.bool()
    return _with_first(apart_BS.expand(shape[0], -1))


def _by_positions(positions: Any, shape: tuple[int, int]) -> Tensor | None:
    """Position ids (B, S), (1, S) or (P, B, S): they start at 0 again, or fall."""
    if not isinstance(positions, Tensor) or positions.shape[-1] != shape[1]:
        return None
    if positions.ndim == 1:
        positions = positions[None]
    planes_PBS = positions[None] if positions.ndim == 2 else positions
    if planes_PBS.ndim != 3 or planes_PBS.shape[1] not in (1, shape[0]):
        return None
    starts_BS: Tensor = (planes_PBS == 0).all(0)
    starts_BS[:, 1:] |= planes_PBS[0, :, 1:] < planes_PBS[0, :, :-1]
    return starts_BS.expand(shape)


def _with_first(starts_BS: Tensor) -> Tensor:
    return torch.nn.functional.pad(starts_BS, (1, 0), value=True)
