"""ScienceQA: Lu et al., NeurIPS 2022, arXiv 2209.09513."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..task import QUESTION_TEMPLATE, Task, as_in_paper, generated

SCIENCEQA = Task(
    benchmark="scienceqa",
    summary="school science questions, those without an image",
    hub_id="derek-thomas/ScienceQA",
    revision="f18b0a70359ebfb41f658fd564208d0355b013f4",
    folder="scienceqa_text",
    eval_split="test",
    eval_rows=2224,
    inputs=(("Context", "hint"), ("Question", "question")),
    label="answer",
    options=("choices",),
    image="image",
    image_rows="without",
    spellings=("sqa",),
)
SCIENCEQA_GEN = generated(
    SCIENCEQA, template=QUESTION_TEMPLATE, preface="Answer: ", answer="The answer is {}."
)
SCIENCEQA_PAPER = as_in_paper(SCIENCEQA_GEN)

_IMAGE: dict[str, Any] = {
    "benchmark": "scienceqa_image",
    "summary": "school science questions, those with an image",
    "folder": "scienceqa_image",
    "eval_rows": 2017,
    "image_rows": "with",
    "spellings": ("sqa_img",),
}
SCIENCEQA_IMAGE = replace(SCIENCEQA, **_IMAGE)
SCIENCEQA_IMAGE_GEN = replace(SCIENCEQA_GEN, **_IMAGE)

_ALL: dict[str, Any] = _IMAGE | {
    "benchmark": "scienceqa_all",
    "summary": "school science questions, without and with an image",
    "parts": ("scienceqa", "scienceqa_image"),
    "eval_rows": 4241,
    "spellings": ("sqa_all",),
}
SCIENCEQA_ALL = replace(SCIENCEQA, **_ALL)
SCIENCEQA_ALL_GEN = replace(SCIENCEQA_GEN, **_ALL)

TASKS = (
    *(SCIENCEQA, SCIENCEQA_GEN, SCIENCEQA_PAPER),
    *(SCIENCEQA_IMAGE, SCIENCEQA_IMAGE_GEN),
    *(SCIENCEQA_ALL, SCIENCEQA_ALL_GEN),
)
