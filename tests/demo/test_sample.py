"""The sentences that the package ships: enough of them, balanced, in SST-2's columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moelora_eval_tasks.catalog import TASKS
from moelora_eval_tasks.loading import load_split
from moelora_plugin.demo import sources

SAMPLE = Path(sources.__file__).parent / "data"
LEAST = {"train": 400, "validation": 200}


def rows(split: str) -> list[dict[str, Any]]:
    lines = (SAMPLE / f"sst2_sample_{split}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("split", LEAST)
def test_shape(split: str) -> None:
    sample = rows(split)
    assert len(sample) >= LEAST[split]
    assert [list(row) for row in sample] == [["idx", "sentence", "label"]] * len(sample)
    assert [row["idx"] for row in sample] == list(range(len(sample)))
    assert sorted(row["label"] for row in sample) == [0] * (len(sample) // 2) + [1] * (
        len(sample) // 2
    )
    for row in sample:
        assert row["sentence"] == row["sentence"].strip().lower()


def test_no_sentence_occurs_twice() -> None:
    sentences = ["".join(filter(str.isalpha, row["sentence"])) for s in LEAST for row in rows(s)]
    assert len(set(sentences)) == len(sentences)


def test_the_start_of_the_training_rows_is_mixed() -> None:
    """A short demo should not see one label only."""
    labels = [row["label"] for row in rows("train")[:16]]
    assert 4 <= sum(labels) <= 12


def test_it_loads_as_any_data_folder(tmp_path: Path) -> None:
    folder, name = sources.sst2_folder(None, False, tmp_path)
    assert "sample" in name
    assert folder == str(tmp_path / "data")
    for split in LEAST:
        loaded = load_split(TASKS["sst2"], split, data_dir=folder)
        assert loaded["sentence"] == [row["sentence"] for row in rows(split)]
        assert loaded["label"] == [row["label"] for row in rows(split)]
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert found == [
        ".moelora.json",
        "data/glue_sst2/train.parquet",
        "data/glue_sst2/validation.parquet",
    ]


def test_the_data_that_is_used(tmp_path: Path) -> None:
    assert sources.sst2_folder("rows", True, tmp_path) == ("rows", "SST-2 from rows")
    assert sources.sst2_folder("rows", False, tmp_path) == ("rows", "SST-2 from rows")
    assert sources.sst2_folder(None, True, tmp_path) == (None, "SST-2 from the hub")
    assert list(tmp_path.iterdir()) == []
