"""`run_demo`: the whole road from a base model to a shareable adapter with scores."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..analysis.plots import plot_expert_load, plot_loss
from ..errors import ConfigError
from ..evaluation import BASE, EvaluationReport, EvaluationRequest, evaluate
from ..export import export_adapter
from ..files import check_out_folder, file_in, remove_if_bare
from ..manifest import entry, read_manifest
from ..marks import own_files, write_mark
from ..tables import PlainTable, shown
from ..text import plain
from ..training import TrainResult, load_recipe, train
from .sources import base_model, hub_reachable, sst2_folder

TASK = "sst2"
EVALUATION_ROWS = 200

_RECIPE = Path(__file__).with_name("recipe.yaml")


@dataclass(frozen=True)
class DemoResult:
    """What the demo came to.

    Attributes:
        out: its folder.
        data: where the sentences came from.
        training: how training went.
        evaluation: base and adapter on the same rows.
        exported: the shareable folder.
        pictures: the loss curve and the heat map.
        seconds: for everything.
    """

    out: Path
    data: str
    training: TrainResult
    evaluation: EvaluationReport
    exported: Path
    pictures: tuple[Path, ...]
    seconds: float

    def table(self) -> PlainTable:
        """For the terminal."""
        measured = self.evaluation.tasks[TASK]
        ((adapter, difference),) = measured.differences.items()
        low, high = difference.interval
        before, after = (100 * measured.metrics[name]["acc"].value for name in (BASE, adapter))
        table = PlainTable(title="moelora demo", show_header=False)
        table.add_row("Data", self.data)
        table.add_row("Accuracy, base", f"{before:.1f} % of {measured.n}")
        table.add_row("Accuracy, adapter", shown(f"{after:.1f} %", "bold"))
        table.add_row(
            "Difference",
            f"{100 * difference.value:+.1f} points, 95 % interval "
            f"{100 * low:+.1f} to {100 * high:+.1f}",
        )
        table.add_row(
            "Time", f"{self.training.seconds:.0f} s training, {self.seconds:.0f} s in all"
        )
        table.add_row("Trainable parameters", f"{self.training.trainable_parameters:,}")
        table.add_row("Adapter to share", str(self.exported))
        table.add_row("Scores", str(self.evaluation.path))
        for picture in self.pictures:
            table.add_row("Picture", str(picture))
        return table


def run_demo(
    out: Path | str,
    *,
    data_dir: str | None = None,
    steps: int | None = None,
    overwrite: bool = False,
    seed: int = 0,
) -> DemoResult:
    """Train 20/10/4 gRAdamW on SST-2, compare with the base, export, and draw.

    Args:
        out: folder for everything the demo writes.
        data_dir: local data in the hub's column layout; else the hub, else the shipped sample.
        steps: optimizer steps; by default about five minutes' worth on two cores.
        overwrite: replace an earlier demo in `out`.
        seed: seeds everything.

    Raises:
        ConfigError: `out` holds something, or there are no steps to train.
        MissingDependencyError: no base model can be had.
    """
    out = Path(out)
    began = time.perf_counter()
    if steps is not None and steps < 1:  # transformers would take 0 for "as the epochs say"
        raise ConfigError(f"steps is {steps}, expected at least 1; change --steps.")
    check_out_folder(out, overwrite=overwrite, is_whole=False)
    console = Console(stderr=True)

    console.rule("1/4  base model and data")
    from_hub = hub_reachable()
    base = base_model(from_hub)
    out.mkdir(parents=True, exist_ok=True)
    write_mark(out, own_files(out))
    folder, source = sst2_folder(data_dir, from_hub, out)
    for line in (f"base: {base}", f"data: {source}"):
        text = plain(line)
        console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    console.rule("2/4  training")
    overrides = [f"model.name={base}", f"seed={seed}"]
    if steps is not None:
        # At least one point for the loss curve.
        overrides += [f"training.max_steps={steps}", f"training.logging_steps={min(steps, 5)}"]
    recipe = load_recipe(_RECIPE, overrides, data_dir=folder, output_dir=out / "run")
    try:
        trained = train(recipe, overwrite=overwrite)
    finally:
        remove_if_bare(out)

    console.rule("3/4  evaluation, base and adapter on the same rows")
    report = evaluate(
        EvaluationRequest(
            tasks=(TASK,),
            adapters=(str(trained.adapter_dir),),
            data_dir=folder,
            limit=EVALUATION_ROWS,
            compare_base=True,
            seed=seed,
            output=out / "moelora_eval.json",
            overwrite=overwrite,
        )
    )

    console.rule("4/4  export")
    export_adapter(trained.adapter_dir, out / "adapter", eval_file=report.path, overwrite=overwrite)
    routing = entry(read_manifest(trained.adapter_dir), "routing") or {}
    pictures = [out / "loss.png"]
    with file_in(out, "loss.png") as picture:
        plot_loss(trained.log_history, picture, "Film comments, gRAdamW 20/10/4")
    if routing:
        pictures.append(out / "expert_load.png")
        with file_in(out, "expert_load.png") as picture:
            plot_expert_load(routing, picture, "Expert load on film comments")
    return DemoResult(
        out=out,
        data=source,
        training=trained,
        evaluation=report,
        exported=out / "adapter",
        pictures=tuple(pictures),
        seconds=time.perf_counter() - began,
    )
