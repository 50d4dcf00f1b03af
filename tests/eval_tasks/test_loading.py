"""Rows from local files and from the hub, and what is said about bad ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from task_rows import ROWS, write_data, write_split

from moelora_eval_tasks.catalog import TASKS
from moelora_eval_tasks.loading import load_for_lm_eval, load_split
from moelora_eval_tasks.prompts import render
from moelora_plugin.errors import ConfigError, DataError, MissingDependencyError


@pytest.mark.parametrize("name", TASKS)
def test_a_local_split_has_the_tasks_columns(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    rows = load_split(task, task.eval_split, write_data(tmp_path, [name]))
    assert sorted(rows.column_names) == sorted(task.columns)
    expected = [row for row in ROWS[name] if not row.get("image")]
    assert [render(task, row) for row in rows] == [render(task, row) for row in expected]


def test_rows_with_an_image_are_left_out(tmp_path: Path) -> None:
    task = TASKS["scienceqa"]
    rows = load_split(task, "train", write_data(tmp_path, ["scienceqa"]))
    assert "Which country is shown?" not in rows["question"]
    no_images = [row | {"image": None} for row in ROWS["scienceqa"]]
    write_split(tmp_path, "scienceqa", "train", no_images)
    assert len(load_split(task, "train", tmp_path)) == 4


def test_a_limit_draws_rows_by_seed_and_keeps_their_order(tmp_path: Path) -> None:
    sentences = [f"sentence {i:02}" for i in range(50)]
    write_split(tmp_path, "sst2", "train", [{"sentence": s, "label": 0} for s in sentences])

    def draw(limit: int, seed: int) -> list[str]:
        return list(load_split(TASKS["sst2"], "train", tmp_path, limit, seed)["sentence"])

    assert draw(10, seed=1) == draw(10, seed=1) == sorted(draw(10, seed=1))
    assert draw(10, seed=1) != draw(10, seed=2)
    assert draw(50, seed=1) == draw(99, seed=1) == sentences
    with pytest.raises(ConfigError, match="limit is 0, expected at least 1"):
        draw(0, seed=1)


def test_a_missing_folder_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"nowhere does not exist; --data-dir expects a folder with"
    ):
        load_split(TASKS["rte"], "train", tmp_path / "nowhere")
    with pytest.raises(
        DataError, match=r"glue_rte.train\.parquet does not exist \(found there: no"
    ):
        load_split(TASKS["rte"], "train", tmp_path)
    write_data(tmp_path, ["mnli"])
    with pytest.raises(
        DataError, match=r"found there: train, validation_matched\); mnli_mismatched"
    ):
        load_split(TASKS["mnli_mismatched"], "validation_mismatched", tmp_path)


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    path = write_split(tmp_path, "rte", "train", ROWS["rte"])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"train\.parquet is not a parquet file that can be read"):
        load_split(TASKS["rte"], "train", tmp_path)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "x", "label": 0}], r"Column 'sentence' is missing in .*, which has text, label"),
        (
            [{"sentence": "x", "label": -1}] * 3,
            r"no label in 3 of its 3 rows; use a labelled split",
        ),
        ([{"sentence": "x", "label": None}], "no label in 1 of its 1 rows"),
        ([{"sentence": "x", "label": 7}], r"Label 7 .* expected 0, 1 \(in .*, split 'train'\)"),
    ],
)
def test_rows_a_task_cannot_use_are_refused(rows: list[Any], said: str, tmp_path: Path) -> None:
    write_split(tmp_path, "sst2", "train", rows)
    with pytest.raises(DataError, match=said):
        load_split(TASKS["sst2"], "train", tmp_path)


def test_a_split_without_rows_is_refused(tmp_path: Path) -> None:
    with_image = [row for row in ROWS["scienceqa"] if row["image"]]
    write_split(tmp_path, "scienceqa", "test", with_image)
    with pytest.raises(DataError, match=r"Split 'test' of scienceqa in .* has no rows"):
        load_split(TASKS["scienceqa"], "test", tmp_path)


def test_the_labels_of_listed_options_are_checked_row_by_row(tmp_path: Path) -> None:
    rows = [*ROWS["commonsenseqa"], ROWS["commonsenseqa"][0] | {"answerKey": "F"}]
    write_split(tmp_path, "commonsenseqa", "validation", rows)
    with pytest.raises(DataError, match="Label 'F' in column 'answerKey'"):
        load_split(TASKS["commonsenseqa"], "validation", tmp_path)


def test_the_hub_is_asked_for_the_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS["cola"])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = TASKS["cola"]
    assert len(load_split(task, "validation")) == 4
    assert asked == [(("nyu-mll/glue", "cola"), {"split": "validation", "revision": task.revision})]


@pytest.mark.parametrize(
    ("raised", "error", "said"),
    [
        (
            ConnectionError("Couldn't reach it\nand more"),
            MissingDependencyError,
            r"Cannot fetch nyu-mll/glue from the hub \(Couldn't reach it\); pass --data-dir with a "
            r"folder that has glue_cola/train\.parquet",
        ),
        (ValueError('Unknown split "dev".'), DataError, r"has no split 'train' for cola"),
    ],
)
def test_a_hub_that_does_not_answer_is_one_sentence(
    raised: Exception, error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(error, match=said):
        load_split(TASKS["cola"], "train")


def test_lm_eval_gets_rendered_rows_and_may_pass_its_own_metadata(tmp_path: Path) -> None:
    data_dir = str(write_data(tmp_path, ["stsb"]))
    loaded = load_for_lm_eval("stsb", data_dir=data_dir, version=1.0, pretrained="some/model")
    doc = loaded["evaluation"][1]
    prompt = render(TASKS["stsb"], ROWS["stsb"][1])
    assert doc == {
        "task": "stsb",
        "context": prompt.context,
        "choices": list(prompt.choices),
        "gold": 4,
        "label": 3.5,
    }
