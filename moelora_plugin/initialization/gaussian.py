"""Normal initial values.

Shape suffixes: I in, O out, R total rank.
"""

from __future__ import annotations

from torch import nn

from ..errors import ConfigError
from .base import Initialization, InitInput


class Gaussian(Initialization):
    """A from N(0, std^2), B zero     (MoLORA, arXiv 2309.05444: std 0.02).

    Args:
        std: of A, above 0.
        std_b: of B; 0 for zeros, with which the adapted model starts as the base.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(self, *, std: float = 0.02, std_b: float = 0.0) -> None:
        if not std > 0:
            raise ConfigError(f"init_kwargs['std']={std!r} must be a number above 0.")
        if not std_b >= 0:
            raise ConfigError(f"init_kwargs['std_b']={std_b!r} must be a number of at least 0.")
        self.std = std
        self.std_b = std_b

    def __call__(self, inputs: InitInput) -> None:
        """Fill A and B in place, where there are such."""
        if "A" in inputs.tensors:
            nn.init.normal_(inputs.tensors["A"], std=self.std)
        if "B" in inputs.tensors:
            nn.init.normal_(inputs.tensors["B"], std=self.std_b)
