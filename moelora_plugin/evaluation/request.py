"""What to evaluate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..files import check_out_file
from .documents import documents_file, holds_documents
from .report import holds_evaluation

AUTO = "auto"  # the batch size that is chosen
DEFAULT_OUTPUT = "moelora_eval.json"


@dataclass(frozen=True)
class EvaluationRequest:
    """One evaluation, as the command line asks for it.

    Attributes:
        tasks: tasks and groups in any spelling the catalog knows ("glue", "siqa").
        adapters: folders or hub ids of adapters, all for one base; none evaluates `base` alone.
        base: model to put the adapters on; None takes the one the adapters were trained on.
        data_dir: folder with local parquet files; None reads from the hub.
        limit: rows per task, drawn with `seed`; None takes all.
        batch_size: rows per forward pass; "auto" takes as many as fill it with tokens and fit in
            memory. It changes the speed, not the scores.
        compare_base: also score the base without an adapter, on the same load and the same rows.
        guess: where a written answer is not found, guess one with `seed`; else that is a miss.
        dtype: of the weights: "auto" (as saved) or a torch dtype's name.
        device: "cpu", "cuda", ...; None takes a GPU where there is one.
        seed: of the draw of rows, of the guesses and of the bootstrap.
        output: file to write, or folder for `moelora_eval.json`; None is the current folder.
        overwrite: replace an existing file.
        allow_base_mismatch: put an adapter on another base than it was trained on.
        cache: keep answers, and take those that are there.

    Raises:
        ConfigError: the values do not go together.
    """

    tasks: tuple[str, ...]
    adapters: tuple[str, ...] = ()
    base: str | None = None
    data_dir: str | None = None
    limit: int | None = None
    batch_size: int | str = AUTO
    compare_base: bool = False
    guess: bool = False
    dtype: str = "auto"
    device: str | None = None
    seed: int = 0
    output: Path | None = None
    overwrite: bool = False
    allow_base_mismatch: bool = False
    cache: bool = True

    def __post_init__(self) -> None:
        if not self.adapters and self.base is None:
            raise ConfigError(
                "No model is given to evaluate; pass --adapter, or --base for a base alone."
            )
        if self.compare_base and not self.adapters:
            raise ConfigError(
                "--compare-base compares an adapter with its base; pass --adapter too."
            )
        if len(set(self.adapters)) < len(self.adapters):
            raise ConfigError("An adapter is given twice; pass each --adapter once.")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}, expected at least 1; change --limit.")
        check_batch_size(self.batch_size)

    def output_file(self) -> Path:
        """The file to write.

        Raises:
            ConfigError: it is there already and must not be replaced.
        """
        path = Path(self.output or DEFAULT_OUTPUT)
        if path.is_dir() or not path.suffix:
            path = path / DEFAULT_OUTPUT
        check_out_file(
            documents_file(path),
            overwrite=self.overwrite,
            is_ours=holds_documents,
            key="--output",
        )
        check_out_file(path, overwrite=self.overwrite, is_ours=holds_evaluation, key="--output")
        return path


def check_batch_size(batch_size: int | str) -> None:
    """Refuse what is neither a number of rows nor "auto".

    Raises:
        ConfigError: it is not.
    """
    if batch_size != AUTO and (not isinstance(batch_size, int) or batch_size < 1):
        raise ConfigError(
            f"batch_size is {batch_size!r}, expected a whole number of at least 1, or {AUTO!r}; "
            "change --batch-size."
        )
