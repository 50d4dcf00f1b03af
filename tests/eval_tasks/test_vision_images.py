"""Images of rows: found, checked, decoded."""

from __future__ import annotations

import random
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from task_rows import write_split
from vision_rows import SCIENCEQA_IMAGE, VISUAL7W, picture, stored

from moelora_eval_tasks import images
from moelora_eval_tasks.catalog import TASKS
from moelora_eval_tasks.loading import load_for_lm_eval, load_split
from moelora_plugin.errors import DataError, MissingDependencyError

TASK = TASKS["scienceqa_image"]


def load(data_dir: Path, rows: list[dict[str, Any]], **options: Any) -> datasets.Dataset:
    write_split(data_dir, TASK.name, "test", rows)
    return load_split(TASK, "test", data_dir, **options)


def row(image: Any) -> dict[str, Any]:
    return SCIENCEQA_IMAGE[0] | {"image": image}


@pytest.mark.parametrize(
    ("mode", "kind", "corner"),
    [
        ("RGB", "PNG", (0, 0, 0)),
        ("P", "PNG", (0, 0, 0)),
        ("RGBA", "PNG", (0, 0, 0)),
        ("L", "PNG", (0, 0, 0)),
        ("1", "PNG", (0, 0, 0)),
        ("P", "GIF", (0, 0, 0)),
        ("RGB", "WEBP", None),  # with losses
        ("L", "JPEG", None),
        ("CMYK", "JPEG", None),
    ],
)
def test_every_kind_of_picture_is_shown_in_rgb(mode: str, kind: str, corner: Any) -> None:
    shown = images.decode({"bytes": picture("white", mode=mode, kind=kind), "path": None})
    assert (shown.mode, shown.size) == ("RGB", (12, 8))
    assert min(shown.getpixel((11, 7))) > 230
    assert max(shown.getpixel((0, 0))) < 25
    assert corner is None or shown.getpixel((0, 0)) == corner


def test_a_palette_with_degrees_of_transparency_is_shown_without_a_warning() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([200, 10, 20])
    content = BytesIO()
    image.save(content, "PNG", transparency=bytes([128]))
    shown = images.decode({"bytes": content.getvalue(), "path": None})
    assert shown.getpixel((0, 0)) == (200, 10, 20)


def test_a_photograph_is_turned_as_its_camera_was() -> None:
    content = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.open(BytesIO(picture("white"))).save(content, "PNG", exif=exif)
    shown = images.decode({"bytes": content.getvalue(), "path": None})
    assert shown.size == (8, 12)
    assert shown.getpixel((7, 0)) == (0, 0, 0)
    assert shown.getpixel((0, 0)) == (255, 255, 255)


def test_images_are_read_from_the_file_or_from_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / TASK.folder / "pictures"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(picture("red"))
    (tmp_path / "b.png").write_bytes(picture("blue"))
    inside = load(tmp_path, [row(stored("lime", "a.png")), row(None)])
    assert [one["image"]["path"] for one in inside] == ["a.png"]
    apart = load(tmp_path, [row("pictures/a.png"), row(None), row(str(tmp_path / "b.png"))])
    mixed = load(
        tmp_path,
        [
            row({"bytes": None, "path": "pictures/a.png"}),
            row({"bytes": None, "path": None}),
            row(stored("blue", "pictures/none.png")),
        ],
    )
    for rows, colours in (
        (inside, [(0, 255, 0)]),
        (apart, [(255, 0, 0), (0, 0, 255)]),
        (mixed, [(255, 0, 0), (0, 0, 255)]),
    ):
        assert [images.decode(one["image"]).getpixel((11, 7)) for one in rows] == colours


def test_a_file_of_the_hub_that_says_decode_is_read_as_any_other(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "choices": datasets.List(datasets.Value("string")),
            "answer": datasets.Value("int8"),
            "hint": datasets.Value("string"),
            "image": datasets.Image(),
        }
    )
    theirs = datasets.Dataset.from_list(SCIENCEQA_IMAGE, features=features)
    path = write_split(tmp_path, TASK.name, "test", SCIENCEQA_IMAGE)
    ours = load_split(TASK, "test", tmp_path)
    theirs.to_parquet(path)
    assert b"huggingface" in pq.read_schema(path).metadata
    assert load_split(TASK, "test", tmp_path).to_list() == ours.to_list()


def test_the_hubs_images_are_not_decoded_when_rows_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = datasets.Dataset.from_list(SCIENCEQA_IMAGE).cast_column("image", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: theirs)
    rows = load_split(TASK, "test")
    assert [one["image"] for one in rows] == [
        one["image"] for one in SCIENCEQA_IMAGE if one["image"]
    ]


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ({"bytes": b"no picture", "path": "x.png"}, r"x\.png, is no image; replace"),
        ({"bytes": picture(kind="JPEG")[:-40], "path": None}, r"without a file name, .*truncated"),
        ({"bytes": picture()[:-40], "path": "y.png"}, r"y\.png, cannot be decoded \("),
        ({"bytes": b"", "path": "z.png"}, r"z\.png, is no image;"),
        ({"bytes": None, "path": "not/there.png"}, r".*not/there\.png, does not exist;"),
    ],
)
def test_a_bad_image_is_refused_before_anything_is_scored(
    image: Any, said: str, tmp_path: Path
) -> None:
    rows = [*SCIENCEQA_IMAGE[:2], row(image)]
    with pytest.raises(
        DataError, match=rf"The image of row 2 of scienceqa_image, split 'test', {said}"
    ) as error:
        load(tmp_path, rows)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="row 2 of scienceqa_image"):
        load_for_lm_eval(TASK.name, str(tmp_path))


def test_only_rows_that_are_drawn_are_looked_at_and_keep_their_number(tmp_path: Path) -> None:
    drawn = sorted(random.Random(0).sample(range(6), 2))
    for bad in range(6):
        rows = [row(stored("red", "a.png"))] * 6
        rows[bad] = row({"bytes": b"bad", "path": "b.png"})
        if bad in drawn:
            with pytest.raises(DataError, match=f"row {bad} of scienceqa_image"):
                load(tmp_path, rows, limit=2)
        else:
            assert len(load(tmp_path, rows, limit=2)) == 2


def test_a_file_that_many_rows_share_is_checked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / TASK.folder
    folder.mkdir()
    (folder / "a.png").write_bytes(picture())
    opened = []
    theirs = Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(file) or theirs(file))
    assert len(load(tmp_path, [row("a.png")] * 5)) == 5
    assert opened == [str(folder / "a.png")]
    # Names say nothing about the content of images inside the file.
    same_name = [row(stored("red", "image.png")), row({"bytes": b"bad", "path": "image.png"})]
    with pytest.raises(DataError, match="row 1 of"):
        load(tmp_path, same_name)


def test_a_column_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Column 'image' holds int64, expected images, which are"):
        load(tmp_path, [row(3)])


def test_a_row_shows_its_pictures_anew_each_time_and_a_text_shows_none(tmp_path: Path) -> None:
    load(tmp_path, SCIENCEQA_IMAGE)
    doc = load_for_lm_eval(TASK.name, str(tmp_path))["evaluation"][0]
    shown = images.pictures(doc)
    first, again = list(shown), list(shown)
    assert len(shown) == len(first) == 1
    assert first[0] is not again[0]
    assert first[0].tobytes() == again[0].tobytes()
    assert first[0].getpixel((11, 7)) == (255, 0, 0)
    assert not images.pictures({"image": None})
    assert list(images.pictures({"image": None})) == []


def test_without_pillow_the_extra_to_install_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match=r"Pillow.*pip install 'moelora\[vision\]'"):
        load(tmp_path, SCIENCEQA_IMAGE)
    write_split(tmp_path, "scienceqa", "test", SCIENCEQA_IMAGE)
    assert len(load_split(TASKS["scienceqa"], "test", tmp_path)) == 1  # text needs none


def test_images_in_chunks_stay_with_their_rows(tmp_path: Path) -> None:
    rows = VISUAL7W * 30
    path = write_split(tmp_path, "visual7w", "test", rows)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    loaded = load_split(TASKS["visual7w"], "test", tmp_path)
    assert [one["image"]["bytes"] for one in loaded] == [one["image"]["bytes"] for one in rows]
