"""OpenBookQA: Mihaylov et al., EMNLP 2018, arXiv 1809.02789."""

from __future__ import annotations

from ..task import Task

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

TASKS = (OPENBOOKQA,)
