"""Each sequence is decided about by its prompt, once.

Shape suffixes: B sequences, S positions, I in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...call import Call
from ...call.view import running
from ...errors import ConfigError
from .pooling import PooledInput


class PromptInput(PooledInput):
    """Rows are sequences, pooled over their prompts (MiLoRA, prompt-aware routing).

    In training the prompt is what stands before the first label that counts, in a generation what
    `generate` was given; a sequence that is all answer is decided about by its first real token.
    Behind an encoder the prompt is what the encoder reads, and for the decoder's own tokens what
    the answer starts with. Without labels and outside of `generate`, all real positions are taken
    for the prompt: so is the candidate answer when an evaluation scores log-likelihoods, except its
    last token.
    """

    key = "prompt"

    def positions(self, x_BSI: Tensor, call: Call) -> Tensor | None:
        """All real positions before the answer.

        Raises:
            ConfigError: training without labels, or a layer that sees other tokens.
        """
        if call.shape is None:  # a layer called by itself: all that it gets
            return None
        if x_BSI.shape[:2] != call.shape:
            raise ConfigError(
                f"router_input='prompt' needs the model's own positions {call.shape}, and a layer "
                f"got {tuple(x_BSI.shape[:2])}; name the layer in exclude_modules."
            )
        if call.prompt_BS is None:
            if call.is_training:
                raise ConfigError(
                    "router_input='prompt' finds the prompt by the labels, and this training call "
                    "has none; pass labels, or set router_input='sequence'."
                )
            return call.real_BS
        real_BS = torch.ones_like(call.prompt_BS) if call.real_BS is None else call.real_BS
        # The first real token of each sequence: where there is a prompt, it is part of it.
        first_BS = real_BS & (running(real_BS, call.starts_BS) == 1)
        return call.prompt_BS | first_BS
