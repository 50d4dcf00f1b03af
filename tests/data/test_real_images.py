"""ScienceQA's real questions with an image, in the folder that MOELORA_DATA_DIR names."""

from __future__ import annotations

import pytest

from moelora_eval_tasks.catalog import TASKS
from moelora_eval_tasks.images import pictures
from moelora_eval_tasks.loading import load_for_lm_eval, load_split
from moelora_eval_tasks.prompts import IMAGE_PLACEHOLDER, render

pytestmark = pytest.mark.data


@pytest.mark.parametrize("name", ["scienceqa_image", "scienceqa_image_gen"])
def test_every_row_is_shown_with_its_picture(name: str, real_dir: str) -> None:
    docs = load_for_lm_eval(name, real_dir)["evaluation"]
    assert 0 < len(docs) <= TASKS[name].eval_rows
    for doc in docs:
        (shown,) = pictures(doc)
        assert shown.mode == "RGB"
        assert min(shown.size) > 10
        assert doc["context"].count(IMAGE_PLACEHOLDER) == 1
    assert len({doc["gold"] for doc in docs}) >= 4


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_all_of_scienceqa_is_both_halves(split: str, real_dir: str) -> None:
    tasks = [TASKS[name] for name in ("scienceqa", "scienceqa_image", "scienceqa_all")]
    text, shown, both = (load_split(task, split, real_dir) for task in tasks)
    assert len(both) == len(text) + len(shown)
    prompts = [render(tasks[-1], row) for row in both]
    assert prompts == [
        *(render(tasks[0], row) for row in text),
        *(render(tasks[1], row) for row in shown),
    ]
