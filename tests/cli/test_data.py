"""`moelora data prepare`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner
from vision_rows import picture

from moelora_cli.main import app
from moelora_eval_tasks.catalog import TASKS
from moelora_eval_tasks.loading import load_split


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    folder = tmp_path / "downloads"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "v7w_5.jpg").write_bytes(picture(kind="JPEG"))
    question = {
        "qa_id": 1,
        "question": "What is it?",
        "answer": "A wall.",
        "multiple_choices": ["A cat.", "A van.", "A sea."],
        "type": "what",
    }
    images = [
        {"filename": "v7w_5.jpg", "split": split, "qa_pairs": [question]}
        for split in ("train", "val", "test")
    ]
    (folder / "dataset_v7w_telling.json").write_text(json.dumps({"images": images}))
    return folder


def prepare(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["data", "prepare", "visual7w", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


def test_visual7w_is_prepared_and_can_be_named_as_data_dir(downloads: Path, tmp_path: Path) -> None:
    code, said = prepare("--from", downloads, "--out", tmp_path / "data")
    assert code == 0, said
    assert "1 train, 1 validation, 1 test questions about 1 images" in said
    assert str(tmp_path / "data" / "visual7w") in said
    assert len(load_split(TASKS["visual7w_paper"], "test", tmp_path / "data")) == 1


def test_what_is_wrong_is_one_sentence_and_nothing_is_written(
    downloads: Path, tmp_path: Path
) -> None:
    code, said = prepare("--from", tmp_path / "nowhere", "--out", tmp_path / "data")
    assert code == 1
    assert said.startswith("Error: ")
    assert "has neither dataset_v7w_telling.json nor dataset_v7w_telling.zip" in said
    (downloads / "images" / "v7w_5.jpg").unlink()
    code, said = prepare("--from", downloads, "--out", tmp_path / "data")
    assert (code, said.count("Error")) == (1, 1)
    assert "1 of 1 images are not in" in said
    assert not (tmp_path / "data").exists()


def test_what_is_there_is_replaced_only_if_asked(downloads: Path, tmp_path: Path) -> None:
    arguments = ("--from", downloads, "--out", tmp_path)
    assert prepare(*arguments)[0] == 0
    code, said = prepare(*arguments)
    assert code == 1
    assert "pass --overwrite" in said
    assert prepare(*arguments, "--overwrite")[0] == 0
