"""Each sequence is decided about as a whole.

Shape suffixes: B sequences, S positions, I in.
"""

from __future__ import annotations

from torch import Tensor

from ...call import Call
from .pooling import PooledInput


class SequenceInput(PooledInput):
    """Rows are sequences, pooled over their real positions (VT-MixLoRA's instances).

    In training that is question and answer; in a generation what its first call shows, so "prompt"
    is nearer to what is known when an answer begins. A layer that sees other tokens than the
    model's input (an image's patches) pools all of them.
    """

    key = "sequence"

    def positions(self, x_BSI: Tensor, call: Call) -> Tensor | None:
        """All but padding."""
        return call.real_BS if x_BSI.shape[:2] == call.shape else None
