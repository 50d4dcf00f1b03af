"""What every modifier is, and how several act together.

Shape suffixes: N rows, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ...errors import ConfigError
from ...frozen import KeepsFrozen
from ...lookup import unknown_key_message
from ...types import LayerPlan, Rows


class Modifier:
    """Changes a router at one or more stages; every stage does nothing unless overridden.

    What the class attributes say is declared for contract tests and docs.

    Attributes:
        mixes_rows: whether it makes a row's gates depend on the other rows (capacity).
        random: whether a training forward draws random numbers.
        example: a value as the configuration may have it.

    Args:
        value: what stands beside the name in `router_modifiers`: a number, or a mapping of options.
        plan: the layer's experts.
    """

    mixes_rows = False
    random = False
    example: ClassVar[Any]

    def __init__(self, value: Any, plan: LayerPlan) -> None:
        self.plan = plan

    def tensors(self) -> dict[str, Tensor]:
        """State that is saved with the adapter but not trained, by name."""
        return {}

    def on_input(self, rows: Rows, state: nn.Module) -> Rows:
        """Before the score. `state` holds the tensors as attributes, and `training`."""
        return rows

    def on_logits(self, logits_NE: Tensor, rows: Rows, state: nn.Module) -> Tensor:
        """Between score and router."""
        return logits_NE

    def on_probs(self, probs_NE: Tensor, rows: Rows, state: nn.Module) -> Tensor:
        """Between the router's probabilities and its selection; 0 takes an expert out of it."""
        return probs_NE

    def selection_bias(self, state: nn.Module) -> Tensor | None:
        """What is added to the logits (E,) for the selection alone; None for nothing."""
        return None

    def on_weights(self, weights_NE: Tensor, rows: Rows, state: nn.Module) -> Tensor:
        """After the selection."""
        return weights_NE

    def before_call(self, state: nn.Module) -> None:
        """Before each training call of the model: the place to change tensors.

        A forward must not change them, since its recomputation under activation checkpointing has
        to see the same.
        """


class RouterModifiers(KeepsFrozen):
    """The modifiers of one layer and adapter, applied in the order of the configuration."""

    def __init__(self, modifiers: Sequence[Modifier]) -> None:
        super().__init__()
        self.modifiers = tuple(modifiers)
        for modifier in self.modifiers:
            for name, tensor in modifier.tensors().items():
                self.register_frozen(name, tensor)

    def __bool__(self) -> bool:
        return len(self.modifiers) > 0  # torch 2.9 cannot trace bool of a tuple

    @property
    def mixes_rows(self) -> bool:
        """Whether one of them does."""
        return any(modifier.mixes_rows for modifier in self.modifiers)

    @property
    def change_input(self) -> bool:
        """Whether one of them changes the rows before the score."""
        return any(type(modifier).on_input is not Modifier.on_input for modifier in self.modifiers)

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

    def selection_bias(self) -> Tensor | None:
        """See `Modifier`; several add up."""
        total_E: Tensor | None = None
        for modifier in self.modifiers:
            bias_E = modifier.selection_bias(self)
            if bias_E is not None:
                total_E = bias_E if total_E is None else total_E + bias_E
        return total_E

    def on_weights(self, weights_NE: Tensor, rows: Rows) -> Tensor:
        """See `Modifier`."""
        for modifier in self.modifiers:
            weights_NE = modifier.on_weights(weights_NE, rows, self)
        return weights_NE

    def before_call(self) -> None:
        """See `Modifier`."""
        for modifier in self.modifiers:
            modifier.before_call(self)


def number_in(name: str, value: Any, wanted: str, fits: Callable[[float], bool]) -> float:
    """A number among a modifier's options.

    Args:
        name: the modifier.
        value: what the configuration gives.
        wanted: what that must be, in words.
        fits: whether a number is in range.

    Raises:
        ConfigError: it is no number, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
        raise ConfigError(f"router_modifiers[{name!r}]: {value!r} must be {wanted}.")
    return value


def options_of(name: str, value: Any, main: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A modifier's options, whose value may be the main one alone.

    Args:
        name: the modifier.
        value: what the configuration gives: the main option's value, or a mapping of options.
        main: the option that a plain value stands for.
        defaults: every option.

    Raises:
        ConfigError: an option that the modifier does not have.
    """
    given = dict(value) if isinstance(value, Mapping) else {main: value}
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise ConfigError(unknown_key_message(f"router_modifiers[{name!r}]", unknown[0], defaults))
    return {**defaults, **given}
