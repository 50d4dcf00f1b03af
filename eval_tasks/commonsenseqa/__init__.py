"""CommonsenseQA: Talmor et al., NAACL 2019, arXiv 1811.00937."""

from __future__ import annotations

from ..task import Task, as_in_paper, generated

COMMONSENSEQA = Task(
    benchmark="commonsenseqa",
    summary="everyday knowledge, five options",
    hub_id="tau/commonsense_qa",
    revision="94630fe30dad47192a8546eb75f094926d47e155",
    folder="commonsense_qa",
    eval_rows=1221,
    inputs=(("Question", "question"),),
    label="answerKey",
    options=("choices",),
    spellings=("csqa",),
)
COMMONSENSEQA_GEN = generated(
    COMMONSENSEQA,
    template="{instruction}\n\n### Question and Possible Answers:\n{question}\n{options}\n\n"
    "### Correct Answer:\n",
    option="({letter}). {text}",
)
COMMONSENSEQA_PAPER = as_in_paper(COMMONSENSEQA_GEN)

TASKS = (COMMONSENSEQA, COMMONSENSEQA_GEN, COMMONSENSEQA_PAPER)
