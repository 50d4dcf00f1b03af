"""The rows of a run beside its JSON: what was asked, what was right, what each model answered.

One parquet file for all tasks, so that a page can show them without the data set, and pandas or
DuckDB can read them. Columns, one row per document:

    task, doc          the task, and the row's number in it
    prompt             the text that the model was shown
    options            texts of the options in the order shown; empty where the answers are words
    answer             the right answer; of a rating task the label
    category           where the task has categories
    image              a JPEG of at most `THUMBNAIL` pixels a side, where the row has an image
    answers.<model>    what the model answered: the likeliest answer, the text it wrote, or a rating
    right.<model>      whether that is right; null for a rating
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelora_eval_tasks.catalog import Task
from moelora_eval_tasks.images import decode

from ..errors import ConfigError
from ..files import sha256_of

if TYPE_CHECKING:
    from .harness import Predictions

THUMBNAIL = 256  # pixels
_QUALITY = 75

Document = dict[str, Any]


def documents_file(report: Path) -> Path:
    """Where the documents of a report lie."""
    return report.with_name(f"{report.stem}_documents.parquet")


def write_documents(path: Path, documents: Iterable[Document], models: Sequence[str]) -> str:
    """Write documents whole or not at all.

    Args:
        path: the file.
        documents: of all tasks, as `documents_of` makes them.
        models: whose answers they have.

    Returns:
        The file's sha256.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        table = pa.Table.from_pylist(list(documents), schema=_schema(models))
        pq.write_table(table, temporary, compression="zstd")
        digest = sha256_of(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def documents_of(
    task: Task, rows: Iterable[Mapping[str, Any]], predictions: Mapping[str, Predictions]
) -> Iterator[Document]:
    """The documents of one task.

    Args:
        task: an entry of the catalog.
        rows: what `loading.load_for_lm_eval` made of them.
        predictions: what was answered, by model.
    """
    is_rating = task.rating == "mean"
    for i, row in enumerate(rows):
        answer = f"{row['label']:g}" if is_rating else row["choices"][row["gold"]].strip()
        yield {
            "task": task.name,
            "doc": i,
            "prompt": row["context"],
            "options": row["options"],
            "answer": answer,
            "category": row["category"],
            "image": _thumbnail(row["image"]),
            "answers": {
                model: f"{one.pred[i]:.2f}" if is_rating else one.answers[i]
                for model, one in predictions.items()
            },
            "right": {
                model: None if is_rating else bool(one.pred[i] == row["label"])
                for model, one in predictions.items()
            },
        }


def read_documents(path: Path, sha256: str) -> dict[str, list[Document]]:
    """The documents of a run, by task.

    Args:
        path: the file.
        sha256: what the run's JSON says of it.

    Raises:
        ConfigError: the file is not the one that the run wrote.
    """
    import pyarrow.parquet as pq

    if sha256_of(path) != sha256:
        raise ConfigError(
            f"{path} is not the file that was written with its moelora_eval.json; remove it to go "
            "without documents, or run `moelora eval` again."
        )
    found: dict[str, list[Document]] = {}
    for document in pq.read_table(path).to_pylist():
        found.setdefault(document["task"], []).append(document)
    return found


def _schema(models: Sequence[str]) -> Any:
    import pyarrow as pa

    return pa.schema(
        {
            "task": pa.string(),
            "doc": pa.int32(),
            "prompt": pa.string(),
            "options": pa.list_(pa.string()),
            "answer": pa.string(),
            "category": pa.string(),
            "image": pa.binary(),
            "answers": pa.struct({model: pa.string() for model in models}),
            "right": pa.struct({model: pa.bool_() for model in models}),
        }
    )


def _thumbnail(image: Mapping[str, Any] | None) -> bytes | None:
    if image is None:
        return None
    small = decode(image)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=_QUALITY)
    return out.getvalue()
