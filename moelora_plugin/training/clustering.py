"""Cluster the training prompts of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moelora_eval_tasks.catalog import resolve

from ..base_model import default_device
from ..clusters import (
    FEATURES,
    fit_clusters,
    read_prompts,
    require_scikit_learn,
)
from ..files import check_out_folder
from ..lookup import given
from ..tables import PlainTable
from .base import load_model, load_processor
from .data import load_data, refuse_images
from .recipe import Recipe


@dataclass(frozen=True)
class ClusterResult:
    """What clustering came to.

    Attributes:
        folder: what `ClusterAssigner.load` and `data.clusters` take.
        method: what prompts were compared by.
        sizes: prompts of each cluster.
    """

    folder: Path
    method: str
    sizes: tuple[int, ...]

    def table(self) -> PlainTable:
        """The result for a terminal."""
        table = PlainTable("", "", title="Clusters", show_header=False)
        table.add_row("Method", self.method)
        table.add_row("Training prompts", f"{sum(self.sizes):,}")
        table.add_row("Clusters", f"{len(self.sizes):,}")
        middle = sorted(self.sizes)[len(self.sizes) // 2]
        spread = f"{min(self.sizes):,} / {middle:,} / {max(self.sizes):,}"
        table.add_row("Smallest / median / largest", spread)
        table.add_row("Folder", str(self.folder))
        return table


def cluster(
    recipe: Recipe,
    out: Path | str,
    *,
    method: str = "embedding",
    num_clusters: int = 64,
    batch_size: int = 8,
    overwrite: bool = False,
) -> ClusterResult:
    """Cluster the prompts that a recipe trains on, and save the clusters.

    Args:
        recipe: its base, its data and its seed count.
        out: the folder to make.
        method: "embedding" (MoCLE), "gradient" (ELREA), or a kind of features that somebody has
            registered or names by its dotted path.
        num_clusters: how many.
        batch_size: prompts at once through the base.
        overwrite: replace what `out` holds.

    Raises:
        ConfigError: an unknown method or task, more clusters than prompts, or `out` is taken.
        DataError: the data is not what a task needs.
        MissingDependencyError: scikit-learn, the base or the data is not here.
    """
    require_scikit_learn()
    check_out_folder(out, overwrite=overwrite)
    kind = given("features", method, FEATURES)
    refuse_images(resolve(recipe.data.tasks), "are not compared; cluster tasks of text alone")
    processor = load_processor(recipe.model)
    data = load_data(recipe.data, processor, seed=recipe.seed, validation=False)
    columns = {name: data.train[name] for name in ("input_ids", "labels")}
    features = kind(load_model(recipe.model, default_device()), recipe.seed)
    found = fit_clusters(read_prompts(columns), features, num_clusters, batch_size=batch_size)
    folder = found.save(
        out,
        manifest={"data": data.to_dict()},
        overwrite=overwrite,
    )
    return ClusterResult(folder, method, found.sizes)
