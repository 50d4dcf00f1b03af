"""Social IQa: Sap et al., EMNLP 2019, arXiv 1904.09728."""

from __future__ import annotations

from ..task import QUESTION_TEMPLATE, Task, as_in_paper, generated

SIQA = Task(
    benchmark="siqa",
    summary="Social IQa: why people act and how they feel, three options",
    hub_id="lighteval/siqa",
    # Not pinned yet: only the short form 54c6a1f is known to us, and the hub wants a full hash.
    revision="main",
    folder="social_i_qa",
    eval_rows=1954,
    inputs=(("Context", "context"), ("Question", "question")),
    labels=("1", "2", "3"),
    options=("answerA", "answerB", "answerC"),
    spellings=("social_iqa",),
)
# The paper's code has no Social IQa: shown as ScienceQA, the other questions with a context.
SIQA_GEN = generated(SIQA, template=QUESTION_TEMPLATE, answer="The answer is {}.")
SIQA_PAPER = as_in_paper(SIQA_GEN)

TASKS = (SIQA, SIQA_GEN, SIQA_PAPER)
