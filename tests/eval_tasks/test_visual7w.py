"""Visual7W's files, made from a small archive in the official form."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from vision_rows import picture

from moelora_eval_tasks.catalog import TASKS
from moelora_eval_tasks.images import decode
from moelora_eval_tasks.loading import load_split
from moelora_eval_tasks.prompts import render
from moelora_eval_tasks.visual7w.prepare import prepare
from moelora_plugin.errors import ConfigError, DataError

COLOURS = {"v7w_1.jpg": "red", "v7w_2.jpg": "green", "v7w_3.jpg": "blue", "v7w_4.jpg": "gray"}


def pair(qa_id: int, question: str, *choices: str, kind: str = "what") -> dict[str, Any]:
    answer, *wrong = choices or ("Red.", "Green.", "Blue.", "Gray.")
    return {
        "qa_id": qa_id,
        "question": question,
        "answer": answer,
        "multiple_choices": wrong,
        "type": kind,
        "image_id": 1,
    }


def image(name: str, split: str, *pairs: dict[str, Any]) -> dict[str, Any]:
    return {"image_id": 1, "filename": name, "split": split, "qa_pairs": list(pairs)}


OFFICIAL = {
    "dataset": "v7w_telling",
    "images": [
        image("v7w_3.jpg", "test", pair(31, "What colour?"), pair(30, "Where?", *"wxyz")),
        image("v7w_1.jpg", "train", pair(10, "Why?", "Luck.", "Rain.", "Fun.", "Fog.", kind="why")),
        image("v7w_2.jpg", "val", pair(20, "Who?")),
        image("v7w_4.jpg", "test", pair(40, "When?")),
    ],
}


def download(
    folder: Path,
    official: Any = OFFICIAL,
    *,
    names: Iterable[str] = COLOURS,
    zipped: bool = False,
) -> Path:
    """What a user has after downloading, and after unpacking or not."""
    folder.mkdir(exist_ok=True)
    files = {f"images/{name}": picture(COLOURS[name], kind="JPEG") for name in names}
    annotations = {"dataset_v7w_telling.json": json.dumps(official).encode()}
    for archive, content in (
        ("visual7w_images.zip", files),
        ("dataset_v7w_telling.zip", annotations),
    ):
        if zipped:
            with zipfile.ZipFile(folder / archive, "w", zipfile.ZIP_DEFLATED) as file:
                for name, data in content.items():
                    file.writestr(name, data)
            continue
        for name, data in content.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_the_official_files_become_a_data_folder(zipped: bool, tmp_path: Path) -> None:
    source = download(tmp_path / "downloads", zipped=zipped)
    seen: list[str] = []
    prepared = prepare(
        source, tmp_path / "data", progress=lambda names: seen.extend(names) or names
    )
    assert prepared.folder == tmp_path / "data" / "visual7w"
    assert prepared.rows == {"train": 1, "validation": 1, "test": 3}
    assert prepared.images == len(seen) == 4
    assert sorted(path.name for path in prepared.folder.iterdir()) == [
        ".moelora.json",
        "images",
        "test.parquet",
        "train.parquet",
        "validation.parquet",
    ]
    assert pq.read_table(prepared.folder / "train.parquet").to_pylist() == [
        {
            "qa_id": 10,
            "image": "images/v7w_1.jpg",
            "question": "Why?",
            "choices": ["Luck.", "Rain.", "Fun.", "Fog."],
            "answer": 0,
            "type": "why",
        }
    ]
    for name, colour in COLOURS.items():
        copied = (prepared.folder / "images" / name).read_bytes()
        assert copied == picture(colour, kind="JPEG")


def test_what_is_prepared_can_be_trained_on_and_scored(tmp_path: Path) -> None:
    prepare(download(tmp_path / "downloads"), tmp_path / "data")
    task = TASKS["visual7w"]
    rows = load_split(task, "test", tmp_path / "data")
    assert rows["qa_id"] == [31, 30, 40]  # in the official order
    for row in rows:
        prompt = render(task, row)
        assert prompt.options[prompt.gold] == row["choices"][0]
    blue = decode(rows[0]["image"]).getpixel((11, 7))
    assert blue[2] > 230 > 25 > max(blue[:2])
    for split in ("train", "validation"):
        assert len(load_split(task, split, tmp_path / "data")) == 1
    # The data folder may be moved.
    (tmp_path / "data").rename(tmp_path / "moved")
    assert decode(load_split(task, "test", tmp_path / "moved")[2]["image"]).size == (12, 8)


def test_a_folder_that_is_there_is_kept_unless_it_may_go(tmp_path: Path) -> None:
    source = download(tmp_path / "downloads")
    prepare(source, tmp_path / "data")
    with pytest.raises(ConfigError, match=r"visual7w already holds something; .*--overwrite"):
        prepare(source, tmp_path / "data")
    other = [*OFFICIAL["images"], image("v7w_4.jpg", "train", pair(41, "How many?"))]
    download(source, {"images": other})
    assert prepare(source, tmp_path / "data", overwrite=True).rows["train"] == 2
    assert len(load_split(TASKS["visual7w"], "train", tmp_path / "data")) == 2


def _without(*names: str) -> list[str]:
    return [name for name in COLOURS if name not in names]


def _pointing(pairs: dict[str, Any]) -> dict[str, Any]:
    return {"images": [image("v7w_1.jpg", "train", pairs | {"answer": 17})]}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"names": _without("v7w_1.jpg", "v7w_4.jpg")},
            r"2 of 4 images are not in .*, the first of them v7w_1\.jpg; download",
        ),
        ({"official": []}, r"is not the telling part of Visual7W \(TypeError"),
        ({"official": {}}, r"is not the telling part of Visual7W \(KeyError: 'images'\)"),
        ({"official": {"images": []}}, "has no question of split 'train'"),
        (
            {"official": {"images": [image("v7w_1.jpg", "dev", pair(1, "What?"))]}},
            r"Visual7W \(KeyError: 'dev'\)",
        ),
        (
            {"official": {"images": [image("v7w_1.jpg", "train", {"qa_id": 3})]}},
            r"Visual7W \(KeyError: 'answer'\)",
        ),
        ({"official": _pointing(pair(1, "Which?"))}, "an answer is no text, as in the pointing"),
    ],
)
def test_files_that_are_not_the_official_ones_are_named(
    changed: dict[str, Any], said: str, zipped: bool, tmp_path: Path
) -> None:
    source = download(tmp_path / "downloads", zipped=zipped, **changed)
    with pytest.raises(DataError, match=said):
        prepare(source, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("dataset_v7w_telling.zip", r"has neither dataset_v7w_telling\.json nor .*\.zip; download"),
        ("visual7w_images.zip", r"has neither visual7w_images\.zip nor a folder images; download"),
    ],
)
def test_a_missing_or_broken_download_is_named(gone: str, said: str, tmp_path: Path) -> None:
    source = download(tmp_path / "downloads", zipped=True)
    (source / gone).write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match=rf"{gone} is not .*download it anew"):
        prepare(source, tmp_path / "data")
    (source / gone).unlink()
    with pytest.raises(DataError, match=said):
        prepare(source, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_an_archive_with_other_files_is_named(tmp_path: Path) -> None:
    source = download(tmp_path / "downloads", zipped=True)
    with zipfile.ZipFile(source / "dataset_v7w_telling.zip", "w") as archive:
        archive.writestr("dataset_v7w_pointing.json", "{}")
    with pytest.raises(DataError, match=r"no item named 'dataset_v7w_telling\.json'"):
        prepare(source, tmp_path / "data")


def test_a_bad_picture_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    source = download(tmp_path / "downloads")
    (source / "images" / "v7w_2.jpg").write_bytes(b"bad")
    with pytest.raises(DataError, match=r"^v7w_2\.jpg is no image; replace it\.$"):
        prepare(source, tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []

    zipped = download(tmp_path / "zipped", zipped=True)
    path = zipped / "visual7w_images.zip"
    content = bytearray(path.read_bytes())
    content[100] ^= 0xFF  # in the first picture
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"v7w_1\.jpg in the archive is damaged \(.*\); download"):
        prepare(zipped, tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_a_file_name_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    outside = [image("../v7w_1.jpg", "train", pair(1, "What?")), *OFFICIAL["images"]]
    source = download(tmp_path / "downloads", {"images": outside})
    with pytest.raises(DataError, match=r"first of them \.\./v7w_1\.jpg"):
        prepare(source, tmp_path / "data")
