"""What a manifest says of an adapter's training, for those who show it or rely on it.

Anybody can have written the file: what is not there is left out, what has another type is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import AdapterError, ConfigError
from .schema import Source, from_mapping

_REMEDY = "save or download the adapter again"
_SOURCE = Source(False, _REMEDY, f"{{key}} is missing; {_REMEDY}.")


@dataclass(frozen=True)
class OptimizerRecord:
    """The optimizer of a recipe."""

    name: str | None = None
    lr: float | None = None
    gate_lr: float | None = None


@dataclass(frozen=True)
class DataRecord:
    """The data section of a recipe."""

    tasks: list[str] | dict[str, float] = field(default_factory=list)
    limit: int | None = None


@dataclass(frozen=True)
class RecipeRecord:
    """A recipe."""

    data: DataRecord = field(default_factory=DataRecord)
    optimizer: OptimizerRecord = field(default_factory=OptimizerRecord)
    seed: int = 0


@dataclass(frozen=True)
class RowsRecord:
    """Rows of one task that were trained on, or validated with."""

    task: str
    split: str
    rows: int


@dataclass(frozen=True)
class LayerRecord:
    """How a layer routes: each expert's share of the selections, and the mean entropy in nats."""

    load: list[float]
    entropy: float


@dataclass(frozen=True)
class Training:
    """How an adapter was trained.

    Attributes:
        recipe: None where no recipe is recorded.
        data: the rows.
        steps: of the optimizer.
        train_loss: the mean.
        trainable_parameters: trained scalars.
        routing: by layer.
    """

    recipe: RecipeRecord | None = None
    data: list[RowsRecord] = field(default_factory=list)
    steps: int | None = None
    train_loss: float | None = None
    trainable_parameters: int | None = None
    routing: dict[str, LayerRecord] | None = None

    def __post_init__(self) -> None:
        for name, layer in (self.routing or {}).items():
            if not layer.load:
                raise ConfigError(f"routing.{name}.load has no experts; {_REMEDY}.")


def training_of(manifest: Mapping[str, Any]) -> Training:
    """What a manifest says of the training.

    Args:
        manifest: as `checkpoint.read_manifest` has it.

    Raises:
        AdapterError: a value has the wrong type.
    """
    try:
        return from_mapping(Training, manifest, source=_SOURCE)
    except ConfigError as error:
        raise AdapterError(f"The adapter's moelora.json is damaged: {error}") from error
