from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny import tiny_tokenizer

from moelora_eval_tasks.catalog import TASKS
from moelora_eval_tasks.loading import load_for_lm_eval
from moelora_plugin.errors import ConfigError, DataError
from moelora_plugin.training.data import TrainingData, load_data
from moelora_plugin.training.recipe import DataSection

TOKENIZER = tiny_tokenizer()


def load(
    data_dir: Path, tasks: Any, *, seed: int = 0, validation: bool = False, **keys: Any
) -> TrainingData:
    section = DataSection(tasks=tasks, data_dir=str(data_dir), **{"max_length": 256, **keys})
    return load_data(section, TOKENIZER, seed=seed, validation=validation)


def texts(rows: Dataset) -> list[str]:
    return [TOKENIZER.decode(tokens) for tokens in rows["input_ids"]]


def trained(rows: Dataset) -> list[str]:
    return [TOKENIZER.decode([t for t in labels if t != -100]) for labels in rows["labels"]]


def test_the_examples_are_the_prompts_that_evaluation_scores(data_dir: Path) -> None:
    for name in ("sst2", "stsb"):
        data = load(data_dir, [name], validation=True)
        assert data.validation is not None
        scored = load_for_lm_eval(name, data_dir=str(data_dir))["evaluation"]
        assert texts(data.validation) == [
            f"<s>{doc['context']}{doc['choices'][doc['gold']]}</s>" for doc in scored
        ]


def test_stsb_trains_the_nearest_whole_number(data_dir: Path) -> None:
    data = load(data_dir, ["stsb"], validation=True)
    ratings = Dataset.from_parquet(str(data_dir / "glue_stsb" / "validation.parquet"))["label"]
    assert data.validation is not None
    assert trained(data.validation) == [f" {int(rating + 0.5)}</s>" for rating in ratings]


def test_a_list_is_concatenated_and_shuffled_by_the_seed(data_dir: Path) -> None:
    one, same, other = (load(data_dir, ["sst2", "cola"], seed=seed) for seed in (1, 1, 2))
    assert len(one.train) == 48 + 8
    assert texts(one.train) == texts(same.train)
    assert texts(one.train) != texts(other.train)
    assert Counter(texts(one.train)) == Counter(texts(other.train))


def test_a_mapping_is_sampled_by_weight_until_every_row_was_drawn(data_dir: Path) -> None:
    data = load(data_dir, {"sst2": 3, "cola": 1})
    is_cola = ["grammatically" in text for text in texts(data.train)]
    assert len(set(texts(data.train))) == 48 + 8
    assert 0.1 < sum(is_cola) / len(is_cola) < 0.4
    assert texts(data.train) == texts(load(data_dir, {"sst2": 3, "cola": 1}).train)


def test_limits_count_rows_per_task(data_dir: Path) -> None:
    data = load(data_dir, ["sst2", "cola"], limit=5, validation_limit=3, validation=True)
    assert [(s.task, s.split, s.rows) for s in data.sources] == [
        ("sst2", "train", 5),
        ("cola", "train", 5),
        ("sst2", "validation", 3),
        ("cola", "validation", 3),
    ]
    assert {source.revision for source in data.sources} == {None}


def test_cut_rows_are_counted_per_task(data_dir: Path) -> None:
    data = load(data_dir, ["sst2", "cola"], limit=4, max_length=12)
    assert [source.cut_rows for source in data.sources] == [4, 4]
    assert data.cut_rows == 8
    assert all(len(tokens) == 12 for tokens in data.train["input_ids"])
    assert set(trained(data.train)) <= {
        f" {answer}</s>" for name in ("sst2", "cola") for answer in TASKS[name].answers
    }


def test_validation_is_never_the_test_split(tmp_path: Path) -> None:
    folder = tmp_path / TASKS["openbookqa"].folder
    folder.mkdir()
    row = {
        "question_stem": ["Which melts first?"],
        "choices": [{"text": ["ice", "iron"], "label": ["A", "B"]}],
        "answerKey": ["A"],
    }
    for split in ("train", "validation"):
        Dataset.from_dict(row).to_parquet(folder / f"{split}.parquet")
    data = load(tmp_path, ["openbookqa"], validation=True)
    assert [source.split for source in data.sources] == ["train", "validation"]


def test_bad_data_is_one_sentence(data_dir: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'sst2'"):
        load(data_dir, ["sst"])
    with pytest.raises(DataError, match="rte"):
        load(data_dir, ["rte"])
    with pytest.raises(DataError, match=r"raise data\.max_length"):
        load(data_dir, ["sst2"], max_length=2)
