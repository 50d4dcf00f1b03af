"""Where a run's files lie, and what it came to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from ..errors import ConfigError
from ..files import check_out_folder, remove_if_bare, remove_own, set_aside
from ..marks import own_files, write_mark
from ..tables import PlainTable


@dataclass(frozen=True)
class RunFolder:
    """The parts of a run on disk.

    Attributes:
        path: the recipe's `output_dir`.
    """

    path: Path

    @property
    def adapter(self) -> Path:
        """The trained adapter."""
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        """The folder of `checkpoint-N`."""
        return self.path / "checkpoints"

    @property
    def recipe(self) -> Path:
        """The recipe, with what it extends and every override resolved."""
        return self.path / "recipe.yaml"

    @property
    def log_history(self) -> Path:
        """Every logged loss, learning rate and evaluation, as transformers keeps them."""
        return self.path / "log_history.json"

    def checkpoint(self, resume: str | Path) -> str:
        """The checkpoint to resume from.

        Args:
            resume: "last", or the path of a checkpoint.

        Raises:
            ConfigError: there is none.
        """
        if str(resume) != "last":
            if not (Path(resume) / TRAINER_STATE_NAME).is_file():
                raise ConfigError(
                    f"{resume} is no checkpoint; give --resume a checkpoint-N or last."
                )
            return str(resume)
        last = get_last_checkpoint(self.checkpoints) if self.checkpoints.is_dir() else None
        if last is None:
            raise ConfigError(
                f"There is no checkpoint in {self.checkpoints} to resume from; leave --resume out "
                "or change output_dir."
            )
        return str(last)

    def check(self, *, overwrite: bool, checkpoint: str | None) -> None:
        """Refuse a folder that another run, or somebody else, is using.

        Args:
            overwrite: replace the run that it holds.
            checkpoint: what the run goes on from; one of this folder means this run.

        Raises:
            ConfigError: it holds something that must stay.
        """
        goes_on = checkpoint is not None and Path(checkpoint).resolve().parent == (
            self.checkpoints.resolve()
        )
        for folder, is_whole in ((self.path, False), (self.adapter, True)):
            check_out_folder(
                folder, overwrite=overwrite or goes_on, key="output_dir", is_whole=is_whole
            )

    def begin(self) -> Path | None:
        """Make the folder, and set the checkpoints of an earlier run aside.

        Returns:
            Where those are, for `restore`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        write_mark(self.path, own_files(self.path))
        return set_aside(self.checkpoints) if self.checkpoints.is_dir() else None

    def restore(self, earlier: Path | None) -> None:
        """Leave nothing of a run that has saved nothing; the Trainer makes its folder early.

        Args:
            earlier: what `begin` returned; it gets its place back if this is free.
        """
        if self.checkpoints.is_dir() and not any(self.checkpoints.iterdir()):
            self.checkpoints.rmdir()
        if earlier is not None and earlier.exists() and not self.checkpoints.exists():
            earlier.rename(self.checkpoints)
        remove_if_bare(self.path)

    def finish(self) -> None:
        """Remove what is ours of the checkpoints that were set aside."""
        for earlier in self.path.glob(f"{self.checkpoints.name}.old*"):
            for checkpoint in earlier.iterdir():
                if checkpoint.is_dir() and not checkpoint.is_symlink():
                    remove_own(checkpoint)
            if not any(earlier.iterdir()):
                earlier.rmdir()


@dataclass(frozen=True)
class TrainResult:
    """What training came to.

    Attributes:
        output_dir: the run's folder.
        adapter_dir: the adapter in it.
        steps: optimizer steps, those before a resume included.
        train_loss: mean loss over the steps of this call.
        eval_loss: validation loss of the saved adapter, or None where the run does not evaluate.
        seconds: time in the training loop.
        trainable_parameters: number of trained scalars.
        rows: training examples.
        cut_rows: examples, of validation too, whose context lost its beginning.
        log_history: every logged value, as transformers keeps them.
    """

    output_dir: Path
    adapter_dir: Path
    steps: int
    train_loss: float
    eval_loss: float | None
    seconds: float
    trainable_parameters: int
    rows: int
    cut_rows: int
    log_history: list[dict[str, Any]]

    def table(self) -> PlainTable:
        """The result for a terminal."""
        table = PlainTable("", "", title="Training", show_header=False)
        table.add_row("Steps", f"{self.steps:,}")
        table.add_row("Training loss", f"{self.train_loss:.4f}")
        if self.eval_loss is not None:
            table.add_row("Validation loss", f"{self.eval_loss:.4f}")
        table.add_row("Time", f"{self.seconds:,.0f} s")
        table.add_row("Trainable parameters", f"{self.trainable_parameters:,}")
        table.add_row("Training rows", f"{self.rows:,}")
        table.add_row("Prompts cut", f"{self.cut_rows:,}")
        table.add_row("Adapter", str(self.adapter_dir))
        return table
