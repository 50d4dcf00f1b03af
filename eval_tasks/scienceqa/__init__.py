"""ScienceQA: Lu et al., NeurIPS 2022, arXiv 2209.09513."""

from __future__ import annotations

from ..task import Task

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

TASKS = (SCIENCEQA,)
