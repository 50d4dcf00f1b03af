"""A training recipe: one YAML file that says which base, adapter, optimizer and data to train with.

    extends: base.yaml                # optional; this file's keys win, section by section
    model: {name: meta-llama/Llama-3.2-3B}
    adapter: {preset: gr_moe_lora, target_modules: [q_proj, k_proj, v_proj, o_proj]}
    optimizer: {name: gradamw, lr: 1e-5}
    data: {tasks: [scienceqa]}        # names or groups; a mapping name -> weight for a mixture
    training: {max_steps: 2000}       # any field of transformers' TrainingArguments

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..schema import from_mapping, require
from ..types import OptimizerName
from .yaml_files import apply_override, read_recipe_file, section


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The base model.

    Attributes:
        name: a local path or a hub id.
        revision: branch, tag or commit on the hub.
        dtype: of the base's weights; `auto` is the checkpoint's own.
        attn_implementation: transformers' name (`sdpa`, `eager`, ...); None lets it choose.
    """

    name: str
    revision: str = "main"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str | None = None


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """The arguments of `build_optimizer`, and where the default learning-rate schedule ends.

    Attributes:
        final_lr_ratio: the linear schedule ends at this multiple of every group's rate. The
            paper's code stretches its schedule over 10/9 of the steps, which ends at 0.1. A recipe
            that sets `training.lr_scheduler_type` has a schedule of its own instead.
    """

    name: OptimizerName = "gradamw"
    lr: float = 1e-5
    gate_lr: float = 3e-8
    gate_max_grad_norm: float | None = 1.0
    damping: float = 1e-6
    order: Literal["jacobi", "gauss_seidel"] = "jacobi"
    bias_correction: bool = True
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    scale_compensation: bool = False
    lora_plus_ratio: float = 1.0
    final_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(self.lr > 0, "optimizer.lr", self.lr, "a number above 0")
        ratio = self.final_lr_ratio
        require(0 <= ratio <= 1, "optimizer.final_lr_ratio", ratio, "a number from 0 to 1")

    def build_arguments(self) -> dict[str, Any]:
        """The keyword arguments of `build_optimizer`."""
        arguments = dataclasses.asdict(self)
        del arguments["final_lr_ratio"]
        return arguments


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """What to train on.

    Attributes:
        tasks: names of tasks and groups. A list is concatenated; a mapping name -> weight is
            sampled in proportion to the weights (a group's weight is shared evenly by its tasks)
            until every row of every task has been drawn once.
        data_dir: folder of local parquet files, one folder per task; None loads from the hub.
        max_length: tokens in an example, those of its image with them; longer prompts lose the
            beginning of their context, and are refused where they show an image.
        limit: training rows per task, chosen with the recipe's seed; None takes all.
        validation_limit: validation rows per task, likewise.
        clusters: folder that `moelora cluster` has made with this base, for adapters that route by
            cluster; None gives examples no cluster.
    """

    tasks: list[str] | dict[str, float]
    data_dir: str | None = None
    max_length: int = 256
    limit: int | None = None
    validation_limit: int | None = None
    clusters: str | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(len(self.tasks) > 0, "data.tasks", self.tasks, "at least one task")
        in_range = 0 < self.max_length < 2**31
        require(in_range, "data.max_length", self.max_length, "a number above 0 and below 2^31")
        if self.clusters is not None:
            expected = "a folder of `moelora cluster`"
            require(Path(self.clusters).is_dir(), "data.clusters", self.clusters, expected)
        for key in ("limit", "validation_limit"):
            rows = getattr(self, key)
            require(rows is None or rows > 0, f"data.{key}", rows, "a number above 0 or null")
        if isinstance(self.tasks, dict):
            for name, weight in self.tasks.items():
                require(weight > 0, f"data.tasks.{name}", weight, "a weight above 0")


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingSection:
    """Stop when the validation loss has not improved; the best checkpoint becomes the adapter.

    Attributes:
        patience: evaluations without improvement before stopping.
        threshold: the least improvement of the loss that counts.
    """

    patience: int
    threshold: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(self.patience > 0, "early_stopping.patience", self.patience, "a number above 0")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a training run depends on.

    Attributes:
        model: the base model.
        data: the tasks.
        output_dir: folder for the adapter, the checkpoints and the logs.
        adapter: `preset` and any field of MoeLoraConfig; checked by MoeLoraConfig.
        optimizer: arguments of `build_optimizer` and the schedule's end.
        training: any field of transformers' TrainingArguments; checked when training starts.
        early_stopping: None trains all steps.
        seed: seeds the adapter's initialisation, the rows drawn, their order and dropout.
    """

    model: ModelSection
    data: DataSection
    output_dir: str
    adapter: dict[str, Any] = field(default_factory=lambda: {"preset": "moe_lora"})
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    training: dict[str, Any] = field(default_factory=dict)
    early_stopping: EarlyStoppingSection | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(0 <= self.seed < 2**32, "seed", self.seed, "a whole number from 0 to 2^32 - 1")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values that YAML and JSON can write and `load_recipe` reads back."""
        values = dataclasses.asdict(self)
        values["optimizer"]["betas"] = list(self.optimizer.betas)
        return values


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    data_dir: str | Path | None = None,
    output_dir: str | Path | None = None,
) -> Recipe:
    """Read a recipe.

    Args:
        path: the YAML file. `extends: other.yaml` in it, relative to it, is read first; sections
            are merged key by key and a key's value is replaced as a whole.
        overrides: `key=value` with dotted keys (`optimizer.lr=1e-4`); values are read as YAML.
        data_dir: replaces `data.data_dir`.
        output_dir: replaces `output_dir`, which is `runs/<the file's stem>` unless set.

    Raises:
        ConfigError: a file cannot be read, or a key or value is wrong.
    """
    path = Path(path)
    values = read_recipe_file(path)
    for override in overrides:
        apply_override(values, override)
    if data_dir is not None:
        section(values, "data")["data_dir"] = str(data_dir)
    if output_dir is not None:
        values["output_dir"] = str(output_dir)
    # A key without a value (`training:` with all its lines commented out) means the default.
    given = {key: value for key, value in values.items() if value is not None}
    return from_mapping(Recipe, {"output_dir": str(Path("runs") / path.stem), **given})
