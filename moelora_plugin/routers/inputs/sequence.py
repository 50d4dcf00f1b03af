"""Each sequence is decided about as a whole.

Shape suffixes: B sequences, S positions, I in.
"""

from __future__ import annotations

from torch import Tensor

from ...call import Call
from ...errors import ConfigError
from .pooling import PooledInput


class SequenceInput(PooledInput):
    """Rows are sequences, pooled over their real positions (VT-MixLoRA's instances).

    In training that is question and answer; in a generation the prompt, so "prompt" is nearer to
    what is known when an answer begins. A layer that sees other tokens than the text (an image's
    patches) pools all of them.
    """

    key = "sequence"

    def positions(self, x_BSI: Tensor, call: Call) -> Tensor | None:
        """All but padding.

        Raises:
            ConfigError: there is padding, and the layer's tokens are not those of the mask.
        """
        if call.real_BS is None or x_BSI.shape[:2] == call.shape:
            return call.real_BS
        if bool(call.real_BS.all()):
            return None
        raise ConfigError(
            f"router_input='sequence' cannot tell which of a layer's {tuple(x_BSI.shape[:2])} "
            f"tokens are padding, since the mask is for {tuple(call.real_BS.shape)}; use batches "
            "without padding, or name the layer in exclude_modules."
        )
