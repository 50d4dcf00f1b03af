"""Rows from local files and from the hub, and what is said about bad ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from task_rows import ROWS, write_data, write_split

from moelora_eval_tasks.catalog import GROUPS, TASKS
from moelora_eval_tasks.loading import load_for_lm_eval, load_split
from moelora_eval_tasks.parsing import MISS
from moelora_eval_tasks.prompts import render
from moelora_plugin.errors import ConfigError, DataError, MissingDependencyError


@pytest.mark.parametrize("name", GROUPS["text"])
def test_a_local_split_has_the_tasks_columns(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    rows = load_split(task, task.eval_split, write_data(tmp_path, [name]))
    assert sorted(rows.column_names) == sorted(task.columns)
    expected = [row for row in ROWS[name] if not row.get("image")]
    assert [render(task, row) for row in rows] == [render(task, row) for row in expected]


def test_a_slice_is_taken_of_the_rows_scored_or_trained_on_and_then_the_limit(
    tmp_path: Path,
) -> None:
    def numbered(split: str, n: int) -> None:
        write_split(tmp_path, "sst2", split, [{"sentence": f"{i}", "label": 0} for i in range(n)])

    def load(split: str, **options: Any) -> list[int]:
        return [int(text) for text in load_split(task, split, tmp_path, **options)["sentence"]]

    numbered("dev", 100)
    numbered("other", 5)
    task = replace(
        TASKS["sst2"],
        train_split="dev",
        train_slice=":90",
        eval_split="dev",
        eval_slice="90::4",
    )
    assert load("train") == list(range(90))
    assert load("dev") == [90, 94, 98]
    assert load("other") == list(range(5))
    assert set(load("dev", limit=2)) < {90, 94, 98}
    numbered("dev", 90)
    with pytest.raises(
        DataError, match=r"'dev' of sst2 has 90 rows, of which it takes \[90::4\]; that leaves none"
    ):
        load("dev")


def test_the_paper_scores_every_fortieth_question_pair(tmp_path: Path) -> None:
    rows = [{"question1": f"{i}", "question2": "", "label": i % 2} for i in range(81)]
    write_split(tmp_path, "qqp", "validation", rows)
    scored = load_split(TASKS["qqp_paper"], "validation", tmp_path)
    assert scored["question1"] == ["0", "40", "80"]
    assert len(load_split(TASKS["qqp_gen"], "validation", tmp_path)) == 81


def test_the_paper_scores_every_fifteenth_row_of_both_halves_of_mnli(tmp_path: Path) -> None:
    task = TASKS["mnli_paper"]
    for split, first, n in (
        ("train", 0, 4),
        ("validation_matched", 100, 20),
        ("validation_mismatched", 200, 20),
    ):
        rows = [
            {"premise": str(first + i), "hypothesis": "", "label": i % 3, "idx": i}
            for i in range(n)
        ]
        write_split(tmp_path, "mnli", split, rows)
    assert load_split(task, task.eval_split, tmp_path)["premise"] == ["100", "115", "210"]
    assert load_split(task, "train", tmp_path)["premise"] == ["0", "1", "2", "3"]
    (tmp_path / "glue_mnli" / "validation_mismatched.parquet").unlink()
    with pytest.raises(
        DataError, match=r"found there: train, .*mnli_mismatched needs it.*part of mnli_paper\)\."
    ):
        load_split(task, task.eval_split, tmp_path)


def test_the_papers_mrpc_is_read_from_either_copys_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TASKS["mrpc_paper"]
    local = load_split(task, "test", write_data(tmp_path, [task.name]))
    theirs = [
        {"text1": row["sentence1"], "text2": row["sentence2"], "label": row["label"]}
        for row in ROWS["mrpc"]
    ]
    asked: list[Any] = []

    def load_dataset(*args: Any, **_: Any) -> datasets.Dataset:
        asked.append(args)
        return datasets.Dataset.from_list(theirs)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_split(task, "test").to_list() == local.to_list() == ROWS["mrpc"]
    assert asked == [("SetFit/mrpc", None)]


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
        "options": [],
        "category": None,
        "image": None,
        "label": 3.5,
        "guess": MISS,
    }


def test_a_rating_in_bins_is_scored_as_the_bin(tmp_path: Path) -> None:
    loaded = load_for_lm_eval("stsb_paper", data_dir=str(write_data(tmp_path, ["stsb_paper"])))
    bins = [(doc["label"], doc["choices"][doc["gold"]][-1]) for doc in loaded["evaluation"]]
    assert bins == [(4, "5"), (3, "4"), (0, "1"), (3, "4"), (1, "2")]


def test_a_guess_is_one_of_the_rows_answers_drawn_by_the_seed(tmp_path: Path) -> None:
    rows = [row for row in ROWS["scienceqa"] if not row["image"]] * 20  # two options, or three
    write_split(tmp_path, "scienceqa", "test", rows)

    def guesses(**options: Any) -> list[int]:
        loaded = load_for_lm_eval("scienceqa_gen", data_dir=str(tmp_path), **options)["evaluation"]
        assert all(doc["guess"] < len(doc["choices"]) for doc in loaded)
        return list(loaded["guess"])

    assert set(guesses()) == {MISS}
    assert set(guesses(guess=True)) == {0, 1, 2}
    assert guesses(guess=True) == guesses(guess=True, seed=0)
    assert guesses(guess=True) != guesses(guess=True, seed=1)
