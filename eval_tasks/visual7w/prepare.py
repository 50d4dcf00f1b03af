"""Visual7W's official files, made into what `--data-dir` expects."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from moelora_plugin.errors import DataError, first_line
from moelora_plugin.files import atomic_directory, check_out_folder
from moelora_plugin.reading import parse_json, read_bytes

from .. import images

FOLDER = "visual7w"
_ANNOTATION_BYTES = 2**30  # the official file has 40 MB
ANNOTATIONS = ("dataset_v7w_telling.json", "dataset_v7w_telling.zip")
ARCHIVE = "visual7w_images.zip"
FOLDERS = ("images", "visual7w_images")  # of the pictures, if that archive is unpacked
SOURCES = (
    "http://ai.stanford.edu/~yukez/papers/resources/dataset_v7w_telling.zip and "
    "http://vision.stanford.edu/yukezhu/visual7w_images.zip"
)
SPLITS = {"train": "train", "val": "validation", "test": "test"}  # official name, ours

Row = dict[str, Any]
Progress = Callable[[list[str]], Iterable[str]]


@dataclass(frozen=True)
class Prepared:
    """What was written.

    Attributes:
        folder: with the splits' parquet files and the folder `images`.
        rows: questions by split.
        images: how many pictures.
    """

    folder: Path
    rows: Mapping[str, int]
    images: int


def prepare(
    source: Path, data_dir: Path, *, overwrite: bool = False, progress: Progress = iter
) -> Prepared:
    """Write `DATA_DIR/visual7w/{train,validation,test}.parquet` and the pictures they name.

    The rows are in the official order; a picture is copied byte for byte, once, however many
    questions ask about it. The official split "val" is called "validation", as everywhere here.

    Args:
        source: folder with `dataset_v7w_telling.json` or `.zip`, and with `visual7w_images.zip` or
            what it unpacks to, a folder `images`.
        data_dir: folder for `--data-dir`.
        overwrite: replace what `visual7w` in it already holds.
        progress: goes through the pictures' names and shows how far it is.

    Raises:
        ConfigError: there is such a folder already.
        DataError: a file is missing or not what it should be, or a picture cannot be decoded.
        MissingDependencyError: Pillow is not installed.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = data_dir / FOLDER
    check_out_folder(out, overwrite=overwrite)
    rows, names = _read_annotations(source)
    found = _find_images(source, names)
    with atomic_directory(out, overwrite=overwrite) as folder:
        (folder / "images").mkdir()
        for name in progress(names):
            _copy(found[name], folder / "images" / name)
        for split, questions in rows.items():
            pq.write_table(pa.Table.from_pylist(questions), folder / f"{split}.parquet")
    return Prepared(out, {split: len(questions) for split, questions in rows.items()}, len(names))


def _read_annotations(source: Path) -> tuple[dict[str, list[Row]], list[str]]:
    """The rows of each split, and the names of the pictures that they are about."""
    path = next((source / name for name in ANNOTATIONS if (source / name).is_file()), None)
    if path is None:
        raise DataError(
            f"{source} has neither {' nor '.join(ANNOTATIONS)}; download {SOURCES} into a folder "
            "and name it with --from."
        )
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS.values()}
    names: dict[str, None] = {}  # each once, in the official order
    try:
        for image in parse_json(_read_json(path))["images"]:
            names[str(image["filename"])] = None
            rows[SPLITS[image["split"]]].extend(_row(image, pair) for pair in image["qa_pairs"])
    except (ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} is not the telling part of Visual7W ({type(error).__name__}: "
            f"{first_line(error)}); download it anew from {SOURCES}."
        ) from error
    if empty := [split for split, found in rows.items() if not found]:
        raise DataError(f"{path} has no question of split {empty[0]!r}; download it anew.")
    return rows, list(names)


def _read_json(path: Path) -> bytes:
    if path.suffix == ".json":
        return read_bytes(path, _ANNOTATION_BYTES)
    with zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith(ANNOTATIONS[0])]
        with archive.open(members[0] if members else ANNOTATIONS[0]) as file:
            content = file.read(_ANNOTATION_BYTES + 1)
    if len(content) > _ANNOTATION_BYTES:
        raise ValueError(f"it holds over {_ANNOTATION_BYTES:,} bytes")
    return content


def _row(image: Mapping[str, Any], pair: Mapping[str, Any]) -> Row:
    """One question. The right answer is the first of the choices; `render` shuffles them."""
    choices = [pair["answer"], *pair["multiple_choices"]]
    if not all(isinstance(choice, str) for choice in choices):
        raise TypeError("an answer is no text, as in the pointing part")
    return {
        "qa_id": int(pair["qa_id"]),
        "image": f"images/{image['filename']}",
        "question": str(pair["question"]),
        "choices": choices,
        "answer": 0,
        "type": str(pair["type"]),
    }


def _find_images(source: Path, names: Sequence[str]) -> dict[str, Path | zipfile.Path]:
    """Where each picture is: a file of a folder, or of the archive."""
    archive = source / ARCHIVE
    folder = next((source / name for name in FOLDERS if (source / name).is_dir()), archive)
    found: dict[str, Path | zipfile.Path]
    if folder.is_dir():
        found = {path.name: path for path in folder.iterdir() if path.is_file()}
    elif archive.is_file():
        try:
            root = zipfile.Path(archive)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(
                f"{archive} is not a zip archive that can be read ({first_line(error)}); download "
                "it anew."
            ) from error
        found = {PurePosixPath(name).name: root / name for name in root.root.namelist()}
    else:
        raise DataError(
            f"{source} has neither {ARCHIVE} nor a folder {FOLDERS[0]}; download {SOURCES} into a "
            "folder and name it with --from."
        )
    if missing := [name for name in names if name not in found]:
        raise DataError(
            f"{len(missing)} of {len(names)} images are not in {folder}, the first of them "
            f"{missing[0]}; download the archive anew."
        )
    return found


def _copy(image: Path | zipfile.Path, out: Path) -> None:
    """Copy a picture, byte for byte, if it is one."""
    try:
        content = image.read_bytes()
    except (zipfile.BadZipFile, zlib.error, OSError) as error:
        where = "folder" if isinstance(image, Path) else "archive"
        raise DataError(
            f"{image.name} in the {where} is damaged ({first_line(error)}); download it anew."
        ) from error
    images.decode({"bytes": content, "path": image.name})
    out.write_bytes(content)
