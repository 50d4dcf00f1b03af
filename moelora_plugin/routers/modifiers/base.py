"""What every modifier is, and how several act together.

Shape suffixes: N rows, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...types import LayerPlan, Rows


class Modifier:
    """Changes a router at one or more stages; every stage does nothing unless overridden.

    Args:
        value: what stands beside the name in `router_modifiers`: a number, or a mapping of options.
        plan: the layer's experts.
    """

    def __init__(self, value: Any, plan: LayerPlan) -> None:
        self.plan = plan

    def buffers(self) -> dict[str, Tensor]:
        """State that is saved with the adapter but not trained, by name."""
        return {}

    def on_input(self, rows: Rows, state: nn.Module) -> Rows:
        """Before the score. `state` holds the buffers as attributes, and `training`."""
        return rows

    def on_logits(self, logits_NE: Tensor, rows: Rows, state: nn.Module) -> Tensor:
        """Between score and router."""
        return logits_NE

    def on_probs(self, probs_NE: Tensor, rows: Rows, state: nn.Module) -> Tensor:
        """Between the router's probabilities and its selection."""
        return probs_NE

    def preference(self, preference_NE: Tensor | None, logits_NE: Tensor, state: nn.Module) -> Any:
        """What the selection goes by, in place of the probabilities; None leaves it as it is."""
        return preference_NE

    def on_weights(self, weights_NE: Tensor, rows: Rows, state: nn.Module) -> Tensor:
        """After the selection."""
        return weights_NE

    def before_call(self, state: nn.Module) -> None:
        """Before each training call of the model: the place to change buffers.

        A forward must not change them, since its recomputation under activation checkpointing has
        to see the same.
        """


class RouterModifiers(nn.Module):
    """The modifiers of one layer and adapter, applied in the order of the configuration."""

    def __init__(self, modifiers: Sequence[Modifier]) -> None:
        super().__init__()
        self.modifiers = tuple(modifiers)
        for modifier in self.modifiers:
            for name, tensor in modifier.buffers().items():
                self.register_buffer(name, tensor)

    def on_input(self, rows: Rows) -> Rows:
        """See `Modifier`."""
        for modifier in self.modifiers:
            rows = modifier.on_input(rows, self)
        return rows

    def on_logits(self, logits_NE: Tensor, rows: Rows) -> Tensor:
        """See `Modifier`."""
        for modifier in self.modifiers:
            logits_NE = modifier.on_logits(logits_NE, rows, self)
        return logits_NE

    def on_probs(self, probs_NE: Tensor, rows: Rows) -> Tensor:
        """See `Modifier`."""
        for modifier in self.modifiers:
            probs_NE = modifier.on_probs(probs_NE, rows, self)
        return probs_NE

    def preference(self, logits_NE: Tensor, probs_NE: Tensor) -> Tensor:
        """The probabilities, unless a modifier has another preference."""
        preference_NE: Tensor | None = None
        for modifier in self.modifiers:
            preference_NE = modifier.preference(preference_NE, logits_NE, self)
        if preference_NE is None:
            return probs_NE
        # An expert that dropped out is not selected for its logit.
        return preference_NE.masked_fill(probs_NE == 0, -float("inf"))

    def on_weights(self, weights_NE: Tensor, rows: Rows) -> Tensor:
        """See `Modifier`."""
        for modifier in self.modifiers:
            weights_NE = modifier.on_weights(weights_NE, rows, self)
        return weights_NE

    def before_call(self) -> None:
        """See `Modifier`."""
        for modifier in self.modifiers:
            modifier.before_call(self)
