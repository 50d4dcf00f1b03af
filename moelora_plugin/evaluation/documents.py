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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelora_eval_tasks.catalog import Task
from moelora_eval_tasks.images import decode

from ..errors import ConfigError, first_line
from ..files import sha256_of
from ..reading import Unreadable

if TYPE_CHECKING:
    from .harness import Predictions

THUMBNAIL = 256  # pixels
DOCUMENT_BYTES = 2**31  # of all texts and images: a hundred thousand rows with a thumbnail each
OPTIONS = 100  # of a row; tasks have ten at most
_AT_ONCE = 1024  # rows
_QUALITY = 75
_NEVER_NULL = {
    "task": str,
    "doc": int,
    "prompt": str,
    "answer": str,
    "answers": dict,
    "right": dict,
}

Document = dict[str, Any]


def documents_file(report: Path) -> Path:
    """Where the documents of a report lie."""
    return report.with_name(f"{report.stem}_documents.parquet")


def holds_documents(path: Path) -> bool:
    """Whether a file is the documents of a run."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return has_columns_of_ours(pq.read_schema(path))
    except (pa.ArrowException, OSError):
        return False


def write_documents(path: Path, documents: Iterable[Document], models: Sequence[str]) -> str:
    """Write documents.

    Args:
        path: the file.
        documents: of all tasks, as `documents_of` makes them.
        models: whose answers they have.

    Returns:
        The file's sha256.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(list(documents), schema=_schema(models))
    pq.write_table(table, path, compression="zstd")
    return sha256_of(path)


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


def read_documents(
    path: Path, sha256: str, rows: Mapping[str, int], models: Sequence[str]
) -> dict[str, list[Document]]:
    """The documents of a run, by task.

    Args:
        path: the file.
        sha256: what the run's JSON says of it.
        rows: how many rows each task of the run has.
        models: the run's models.

    Raises:
        ConfigError: the file is not the one that the run wrote.
    """
    import pyarrow as pa

    found: dict[str, list[Document]] = {task: [] for task in rows}
    try:
        if not path.is_file() or sha256_of(path) != sha256:
            raise Unreadable("it has another digest")
        for document in _documents_in(path, sum(rows.values()), models):
            if not all(isinstance(document[key], kind) for key, kind in _NEVER_NULL.items()):
                raise Unreadable("a value is missing")
            found.setdefault(document["task"], []).append(document)
        if {task: len(of_task) for task, of_task in found.items()} != dict(rows):
            raise Unreadable("it has other rows")
    except (Unreadable, pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is not the file that was written with its moelora_eval.json ("
            f"{first_line(error)}); remove it to go without documents, or run `moelora eval` "
            "again."
        ) from error
    return found


def _documents_in(path: Path, rows: int, models: Sequence[str]) -> Iterator[Document]:
    """The documents of a file, whose size is known before they are made.

    A parquet file of some kilobytes can hold a text of a gigabyte once and name it in every row, so
    texts stay by number (`read_dictionary`) until they are counted.

    Raises:
        Unreadable: it has other columns, another number of rows, or is too large.
    """
    import pyarrow.parquet as pq

    if not has_columns_of_ours(pq.read_schema(path), models):
        raise Unreadable("it has other columns")
    metadata = pq.read_metadata(path)
    if metadata.num_rows != rows:
        raise Unreadable("it has other rows")
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    values = max((chunk.num_values for chunk in chunks), default=0)
    room = DOCUMENT_BYTES - sum(chunk.total_uncompressed_size for chunk in chunks)
    if values > OPTIONS * rows or room < 0:
        raise Unreadable(_too_large())
    texts = {c.path_in_schema for c in chunks if c.physical_type == "BYTE_ARRAY"}
    with pq.ParquetFile(path, read_dictionary=sorted(texts)) as file:
        for batch in file.iter_batches(batch_size=_AT_ONCE):
            room -= sum(map(_bytes_of, batch.columns))
            if room < 0:
                raise Unreadable(_too_large())
            yield from batch.to_pylist()


def _bytes_of(array: Any) -> int:
    """How many bytes the texts of an array have, each as often as it is named."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(array.type):
        lengths = pc.binary_length(array.dictionary).take(array.indices)
        return int(pc.sum(lengths.cast(pa.int64())).as_py() or 0)
    if pa.types.is_struct(array.type) or pa.types.is_list(array.type):
        parts = array.flatten()
        return sum(map(_bytes_of, parts if isinstance(parts, list) else [parts]))
    return int(array.nbytes)


def _too_large() -> str:
    return f"it has more than {DOCUMENT_BYTES:,} bytes, or more than {OPTIONS} options a row"


def has_columns_of_ours(schema: Any, models: Sequence[str] | None = None) -> bool:
    """Whether a parquet file's schema is that of documents, of these models where they are given.

    Args:
        schema: pyarrow's.
        models: the models that must have answers.
    """
    import pyarrow as pa

    if schema.names != _schema([]).names or not pa.types.is_struct(schema.field("answers").type):
        return False
    answers = schema.field("answers").type
    names = [answers.field(i).name for i in range(answers.num_fields)]
    same = models is None or sorted(names) == sorted(models)
    return same and bool(schema.equals(_schema(names)))


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
