"""Social IQa: Sap et al., EMNLP 2019, arXiv 1904.09728."""

from __future__ import annotations

from ..task import Task

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

TASKS = (SIQA,)
