"""OpenBookQA: Mihaylov et al., EMNLP 2018, arXiv 1809.02789."""

from __future__ import annotations

from ..task import QUESTION_TEMPLATE, Task, as_in_paper, generated

OPENBOOKQA = Task(
    benchmark="openbookqa",
    summary="elementary science with a missing fact, four options",
    hub_id="allenai/openbookqa",
    config="main",
    revision="388097ea7776314e93a529163e0fea805b8a6454",
    folder="openbookqa",
    eval_split="test",
    eval_rows=500,
    inputs=(("Question", "question_stem"),),
    label="answerKey",
    options=("choices",),
    spellings=("obqa",),
)
OPENBOOKQA_GEN = generated(OPENBOOKQA, template=QUESTION_TEMPLATE, answer="The answer is {}.")
OPENBOOKQA_PAPER = as_in_paper(OPENBOOKQA_GEN)

TASKS = (OPENBOOKQA, OPENBOOKQA_GEN, OPENBOOKQA_PAPER)
