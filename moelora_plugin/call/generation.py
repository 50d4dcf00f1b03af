"""Where the prompt of a generation ends."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Generation:
    """One call of `generate`.

    What the model is shown first may reach beyond the prompt (assisted decoding has candidates for
    the answer in it), what it is shown later may hold the prompt again (without a cache), and the
    prompt may come in pieces. Only `generate` itself knows where the prompt ends.

    Attributes:
        ends: how many positions the prompt has, padding included; None until the first call of the
            model shows it.
    """

    ends: int | None = None

    def end_of(self, positions: int | None) -> int | None:
        """`ends`, which the first call's positions are where nothing else has told."""
        if self.ends is None:
            self.ends = positions
        return self.ends
