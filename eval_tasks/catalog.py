"""The text tasks: where their rows lie, how they are shown, and what they are scored by.

`prompts` renders a task, `loading` reads it, `scoring` scores it, and one YAML file in a folder of
this package shows it to lm-eval. To add a task, add an entry here and a YAML file; the contract
tests pick it up. Standard library only: listing tasks loads nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from moelora_plugin.errors import ConfigError
from moelora_plugin.lookup import unknown_name_message

from .task import Task

__all__ = ["GROUPS", "TASKS", "Task", "canonical", "resolve"]

PREFIX = "moelora_"  # of our names in lm-eval, which has tasks of the plain names itself

GLUE = "nyu-mll/glue"
GLUE_REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
SENTENCES = (("Sentence 1", "sentence1"), ("Sentence 2", "sentence2"))
PREMISE = (("Premise", "premise"), ("Hypothesis", "hypothesis"))
RELATION = "Decide how the hypothesis relates to the premise: entailment, neutral or contradiction."

_ALL = (
    Task(
        name="scienceqa",
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
        spellings=("sqa",),
    ),
    Task(
        name="commonsenseqa",
        summary="everyday knowledge, five options",
        hub_id="tau/commonsense_qa",
        revision="94630fe30dad47192a8546eb75f094926d47e155",
        folder="commonsense_qa",
        eval_rows=1221,
        inputs=(("Question", "question"),),
        label="answerKey",
        options=("choices",),
        spellings=("csqa",),
    ),
    Task(
        name="openbookqa",
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
    ),
    Task(
        name="siqa",
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
    ),
    Task(
        name="cola",
        summary="is the sentence grammatical?",
        hub_id=GLUE,
        config="cola",
        revision=GLUE_REVISION,
        folder="glue_cola",
        eval_rows=1043,
        instruction="Decide whether the sentence is grammatically correct or wrong.",
        inputs=(("Sentence", "sentence"),),
        stem="The sentence is grammatically",
        labels=(0, 1),
        answers=("wrong", "correct"),
        metrics=("mcc",),
    ),
    Task(
        name="sst2",
        summary="sentiment of a film review's sentence",
        hub_id=GLUE,
        config="sst2",
        revision=GLUE_REVISION,
        folder="glue_sst2",
        eval_rows=872,
        instruction="Decide whether the author of this film comment is positive or negative.",
        inputs=(("Comment", "sentence"),),
        stem="The author's attitude is",
        labels=(0, 1),
        answers=("negative", "positive"),
    ),
    Task(
        name="mrpc",
        summary="do two news sentences say the same?",
        hub_id=GLUE,
        config="mrpc",
        revision=GLUE_REVISION,
        folder="glue_mrpc",
        eval_rows=408,
        instruction="Decide whether the two sentences are equivalent in meaning.",
        inputs=SENTENCES,
        stem="They are",
        labels=(0, 1),
        answers=("not equivalent", "equivalent"),
        metrics=("acc", "f1"),
    ),
    Task(
        name="qqp",
        summary="do two Quora questions ask the same?",
        hub_id=GLUE,
        config="qqp",
        revision=GLUE_REVISION,
        folder="glue_qqp",
        eval_rows=40430,
        instruction="Decide whether the two questions are equivalent in meaning.",
        inputs=(("Question 1", "question1"), ("Question 2", "question2")),
        stem="They are",
        labels=(0, 1),
        answers=("not equivalent", "equivalent"),
        metrics=("acc", "f1"),
    ),
    Task(
        name="mnli",
        summary="does the premise entail the hypothesis? (matched genres)",
        hub_id=GLUE,
        config="mnli",
        revision=GLUE_REVISION,
        folder="glue_mnli",
        eval_split="validation_matched",
        eval_rows=9815,
        instruction=RELATION,
        inputs=PREMISE,
        stem="The relation is",
        labels=(0, 1, 2),
        answers=("entailment", "neutral", "contradiction"),
        spellings=("mnli_matched",),
    ),
    # In no group: the nine GLUE tasks count MNLI once, and local copies often lack this split.
    Task(
        name="mnli_mismatched",
        summary="MNLI on genres it was not trained on; evaluation only, in no group",
        hub_id=GLUE,
        config="mnli",
        revision=GLUE_REVISION,
        folder="glue_mnli",
        eval_split="validation_mismatched",
        eval_rows=9832,
        instruction=RELATION,
        inputs=PREMISE,
        stem="The relation is",
        labels=(0, 1, 2),
        answers=("entailment", "neutral", "contradiction"),
        spellings=("mnli_mm", "mnli_mismatch"),
    ),
    Task(
        name="qnli",
        summary="does the sentence answer the question?",
        hub_id=GLUE,
        config="qnli",
        revision=GLUE_REVISION,
        folder="glue_qnli",
        eval_rows=5463,
        instruction="Does the sentence contain the answer to the question? Answer yes or no.",
        inputs=(("Question", "question"), ("Sentence", "sentence")),
        labels=(0, 1),
        answers=("yes", "no"),
    ),
    Task(
        name="stsb",
        summary="how similar are two sentences, from 0 to 5?",
        hub_id=GLUE,
        config="stsb",
        revision=GLUE_REVISION,
        folder="glue_stsb",
        eval_rows=1500,
        instruction="Rate how similar the two sentences are, from 0 (unrelated) to 5 (the same).",
        inputs=SENTENCES,
        stem="Their similarity can be rated as",
        labels=(0, 1, 2, 3, 4, 5),
        answers=("0", "1", "2", "3", "4", "5"),
        rating=True,
        metrics=("pearson", "spearman"),
    ),
    Task(
        name="rte",
        summary="does the text entail the hypothesis?",
        hub_id=GLUE,
        config="rte",
        revision=GLUE_REVISION,
        folder="glue_rte",
        eval_rows=277,
        instruction="Does the text entail the hypothesis? Answer yes or no.",
        inputs=(("Text", "sentence1"), ("Hypothesis", "sentence2")),
        labels=(0, 1),
        answers=("yes", "no"),
    ),
    Task(
        name="wnli",
        summary="is the pronoun resolved correctly?",
        hub_id=GLUE,
        config="wnli",
        revision=GLUE_REVISION,
        folder="glue_wnli",
        eval_rows=71,
        instruction="Decide whether the resolution of the sentence's pronoun is correct or wrong.",
        inputs=(("Sentence", "sentence1"), ("Resolution", "sentence2")),
        stem="The resolution is",
        labels=(0, 1),
        answers=("wrong", "correct"),
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _ALL}

_QA = ("scienceqa", "commonsenseqa", "openbookqa", "siqa")
_GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")

GROUPS: dict[str, tuple[str, ...]] = {"qa": _QA, "glue": _GLUE, "text": (*_QA, *_GLUE)}


def _squash(name: str) -> str:
    """The spelling-independent form of a name: "SST-2", "sst_2" and "moelora_sst2" are one."""
    return "".join(filter(str.isalnum, name.lower().removeprefix(PREFIX)))


_SPELLINGS = {
    **{_squash(task.folder): task.name for task in reversed(_ALL)},  # a shared folder: the first
    **{_squash(spelling): task.name for task in _ALL for spelling in task.spellings},
    **{_squash(name): name for name in (*TASKS, *GROUPS)},
    "all": "text",
}


def canonical(name: str) -> str:
    """The name of the task or group that `name` is a spelling of.

    Raises:
        ConfigError: there is none; the message offers the nearest names.
    """
    try:
        return _SPELLINGS[_squash(name)]
    except KeyError:
        raise ConfigError(unknown_name_message("task", name, (*TASKS, *GROUPS))) from None


def resolve(names: Iterable[str]) -> list[Task]:
    """The tasks that `names` stand for, each once, in the order given.

    Args:
        names: tasks and groups in any common spelling ("glue", "social_iqa", "moelora_sst2").

    Raises:
        ConfigError: no name is given, or one is unknown.
    """
    known = [canonical(name) for name in names]
    if not known:
        raise ConfigError(f"No task is given; choose from {', '.join((*TASKS, *GROUPS))}.")
    return [TASKS[name] for name in dict.fromkeys(n for k in known for n in GROUPS.get(k, (k,)))]
