"""The clusters of training examples, as a column."""

from __future__ import annotations

from datasets import Dataset

from .assigner import ClusterAssigner


def add_cluster_ids(rows: Dataset, assigner: ClusterAssigner, *, batch_size: int = 8) -> Dataset:
    """The same examples with the column `cluster_id`.

    Args:
        rows: with `input_ids` and `labels`.
        assigner: says which cluster a prompt is in.
        batch_size: prompts at once through the base.
    """
    columns = {name: rows[name] for name in ("input_ids", "labels")}
    ids = assigner.assign(columns, batch_size=batch_size)
    return rows.add_column("cluster_id", ids.tolist())
