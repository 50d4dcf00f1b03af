"""Visual7W, telling: Zhu et al., CVPR 2016, arXiv 1511.03416."""

from __future__ import annotations

from ..task import VISUAL_TEMPLATE, Task, as_in_paper, generated

VISUAL7W = Task(
    benchmark="visual7w",
    summary="what, where, when, who, why and how, asked about photographs",
    hub_id=None,
    revision="main",
    folder="visual7w",
    eval_split="test",
    eval_rows=42031,
    instruction="Choose the option that answers the question about the image.",
    inputs=(("Question", "question"),),
    label="answer",
    options=("choices",),
    shuffle_by="qa_id",  # the files have the right answer first
    image="image",
    category="type",
)
VISUAL7W_GEN = generated(
    VISUAL7W,
    template=VISUAL_TEMPLATE,
    option="{letter}. {text}",
    preface=" ",
    answer="The answer is {}.",
)
VISUAL7W_PAPER = as_in_paper(
    VISUAL7W_GEN,
    summary="Visual7W, the first hundred test rows",
    eval_slice=":100",
    eval_rows=100,
)

TASKS = (VISUAL7W, VISUAL7W_GEN, VISUAL7W_PAPER)
