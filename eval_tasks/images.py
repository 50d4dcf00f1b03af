"""Images of rows: found and checked when rows are loaded, decoded when a model is shown one.

In a row, an image is what the library datasets stores of one: {"bytes", "path"}, the content of an
image file or, where `bytes` is None, the path of that file. Pillow reads them; it is imported here
only, and only for tasks with images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelora_plugin.errors import DataError, MissingDependencyError, first_line

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from PIL.Image import Image


class Pictures:
    """The pictures of one document, decoded anew whenever they are gone through.

    lm-eval asks for the pictures of all documents before the model sees the first; decoded, those
    of Visual7W's 42,000 questions would be tens of gigabytes.
    """

    def __init__(self, images: Sequence[Mapping[str, Any]]) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[Image]:
        return map(decode, self._images)


def pictures(doc: Mapping[str, Any]) -> Pictures:
    """lm-eval's hook `doc_to_image`: the pictures of one row, none where it is text alone.

    Args:
        doc: a row of `loading.load_for_lm_eval`, or of `loading.load_split` with an image.
    """
    return Pictures([] if doc["image"] is None else [doc["image"]])


def decode(image: Mapping[str, Any]) -> Image:
    """The picture in RGB, turned the way up that its EXIF data say.

    Transparency is dropped, as lmms-eval and LLaVA do.

    Args:
        image: of a row, {"bytes", "path"}.

    Raises:
        DataError: it is not there or is no image.
        MissingDependencyError: Pillow is not installed.
    """
    pillow, ops = _pillow()
    try:
        with pillow.open(_file(image)) as opened:
            picture: Image = ops.exif_transpose(opened)
            if picture.mode == "P":  # straight to RGB, Pillow warns of degrees of transparency
                picture = picture.convert("RGBA")
            return picture.convert("RGB")
    except Exception as error:  # each format's reader has errors of its own
        raise DataError(f"{_name(image)} {_trouble(error)}; replace it.") from error


def check(images: Iterable[Mapping[str, Any] | None], rows: Iterable[int], source: str) -> None:
    """Decode every image once, so that a bad one is found before anything is computed.

    Args:
        images: of the rows, None where one has none.
        rows: their numbers, for the message.
        source: what the numbers count in, likewise.

    Raises:
        DataError: an image is not there, or cannot be decoded.
        MissingDependencyError: Pillow is not installed.
    """
    from datasets.utils import tqdm

    pillow, _ = _pillow()
    shown = tqdm(images, desc="Checking images", unit="image", delay=2)  # seconds
    whole = set()  # files that are not looked at again: questions share them
    for row, image in zip(rows, shown, strict=True):
        if image is None or (image["bytes"] is None and image["path"] in whole):
            continue
        try:
            with pillow.open(_file(image)) as opened:
                opened.load()
        except Exception as error:  # each format's reader has errors of its own
            raise DataError(
                f"The image of row {row} of {source}, {_name(image)}, {_trouble(error)}; replace "
                "it or leave the row out."
            ) from error
        if image["bytes"] is None:
            whole.add(image["path"])


def locate(dataset: Dataset, column: str, folder: Path) -> Dataset:
    """Give images the form {"bytes", "path"}, with paths that can be opened, None where is none.

    Args:
        dataset: its images are {"bytes", "path"}, as the hub has them, or paths alone.
        column: with the images.
        folder: what relative paths start from: the parquet file's.

    Raises:
        DataError: the column holds something else.
    """
    import pyarrow as pa
    from datasets import Dataset

    table = dataset.data.table
    values = table.column(column)
    fields = {field.name for field in values.type} if pa.types.is_struct(values.type) else set()
    alone = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    if not (fields >= {"bytes", "path"} or alone or pa.types.is_null(values.type)):
        raise DataError(
            f"Column {column!r} holds {values.type}, expected images, which are "
            "{bytes, path}, or the path of a file, relative to the parquet file's folder."
        )
    located = [_locate(chunk, folder) for chunk in values.chunks]
    images = pa.chunked_array(located, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    table = table.set_column(table.column_names.index(column), column, images)
    # In the hub's files the metadata say that the column is to be decoded when a row is read.
    return Dataset(table.replace_schema_metadata(None))


def _locate(chunk: pa.Array, folder: Path) -> pa.StructArray:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(chunk.type):
        content = pc.struct_field(chunk, "bytes").cast(pa.binary())
        paths = pc.struct_field(chunk, "path").to_pylist()
    else:
        content, paths = pa.nulls(len(chunk), pa.binary()), chunk.to_pylist()
    outside = content.is_null().to_pylist()
    found = [
        str(folder / path) if path and by_path else path
        for path, by_path in zip(paths, outside, strict=True)
    ]
    missing = pa.array([not path and by_path for path, by_path in zip(found, outside, strict=True)])
    return pa.StructArray.from_arrays(
        [content, pa.array(found, pa.string())], ["bytes", "path"], mask=missing
    )


def _file(image: Mapping[str, Any]) -> BytesIO | str:
    return image["path"] if image["bytes"] is None else BytesIO(image["bytes"])


def _name(image: Mapping[str, Any]) -> str:
    return image["path"] or "without a file name"


def _trouble(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, UnidentifiedImageError):  # it says where in memory the image is
        return "is no image"
    return f"cannot be decoded ({first_line(error)})"


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingDependencyError(
            f"Tasks with images need Pillow, which cannot be imported ({error}); "
            "run pip install 'moelora[vision]'."
        ) from error
    return Image, ImageOps
