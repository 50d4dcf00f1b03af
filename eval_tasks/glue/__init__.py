"""GLUE: Wang et al., ICLR 2019, arXiv 1804.07461."""

from __future__ import annotations

from ..task import Task, as_in_paper, generated

GLUE = "nyu-mll/glue"
GLUE_REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
SENTENCES = (("Sentence 1", "sentence1"), ("Sentence 2", "sentence2"))
PREMISE = (("Premise", "premise"), ("Hypothesis", "hypothesis"))
PAIR_TEMPLATE = "{instruction}\n\n{inputs}\n\n### Answer:\n"
RELATION = "Decide how the hypothesis relates to the premise: entailment, neutral or contradiction."

COLA = Task(
    benchmark="cola",
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
)
COLA_GEN = generated(COLA, template="{instruction}\n\n### Sentence:\n{sentence}\n\n### Answer:\n")
COLA_PAPER = as_in_paper(COLA_GEN, metrics=("mcc_x_parsed", "parsed"))

SST2 = Task(
    benchmark="sst2",
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
)
SST2_GEN = generated(
    SST2,
    template="{instruction}\n\n### Comment:\n{sentence}\n\n### Answer:\n",
    answer="The author has a {} attitude.",
)
SST2_PAPER = as_in_paper(SST2_GEN)

MRPC = Task(
    benchmark="mrpc",
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
)
MRPC_GEN = generated(
    MRPC, template="{instruction}\n\n### Sentences:\n{sentence1}\n{sentence2}\n\n### Answer:\n"
)
MRPC_PAPER = as_in_paper(
    MRPC_GEN,
    hub_id="SetFit/mrpc",
    config=None,
    revision="main",  # not pinned yet: no full hash is known to us
    renamed=(("text1", "sentence1"), ("text2", "sentence2")),
    eval_split="test",
    eval_rows=1725,
)

QQP = Task(
    benchmark="qqp",
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
)
QQP_GEN = generated(
    QQP,
    template="{instruction}\n\n### Questions:\n1. {question1}\n2. {question2}\n\n### Answer:\n",
)
QQP_PAPER = as_in_paper(QQP_GEN, eval_slice="::40", eval_rows=1011)

MNLI = Task(
    benchmark="mnli",
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
)
MNLI_GEN = generated(MNLI, template=PAIR_TEMPLATE)
MNLI_PAPER = as_in_paper(
    MNLI_GEN,
    summary="MNLI, every fifteenth row of both halves",
    parts=("mnli", "mnli_mismatched"),
    eval_slice="::15",
    eval_rows=1310,
)

# In no group: the nine GLUE tasks count MNLI once, and local copies often lack this split.
MNLI_MISMATCHED = Task(
    benchmark="mnli_mismatched",
    summary="MNLI on genres that its training split lacks; in no group",
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
)
MNLI_MISMATCHED_GEN = generated(MNLI_MISMATCHED, template=PAIR_TEMPLATE)

QNLI = Task(
    benchmark="qnli",
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
)
QNLI_GEN = generated(
    QNLI,
    template="{instruction}\n\n### Question and Sentence:\n{inputs}\n\n### Response:\n",
    instruction="Decide whether the sentence contains the answer to the question.",
    answer="The sentence {} the answer",
    answers=("contains", "does not contain"),
)
QNLI_PAPER = as_in_paper(QNLI_GEN)

STSB = Task(
    benchmark="stsb",
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
    rating="mean",
    metrics=("pearson", "spearman"),
)
STSB_GEN = generated(
    STSB,
    template="{instruction}\n\n### Sentences:\n1. {sentence1}\n2. {sentence2}\n\n### Answer:\n",
    instruction="Rate how similar the two sentences are, from 1 (unrelated) to 5 (the same).",
    answer="Their similarity can be rated as {}",
    labels=(1, 2, 3, 4, 5),
    answers=("1", "2", "3", "4", "5"),
    rating="bin",
)
STSB_PAPER = as_in_paper(STSB_GEN)

RTE = Task(
    benchmark="rte",
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
)
# The paper's code has no RTE: shown as MNLI, with two answers.
RTE_GEN = generated(
    RTE,
    template=PAIR_TEMPLATE,
    instruction="Decide how the hypothesis relates to the text: entailment or not entailment.",
    answer="The relation is {}.",
    answers=("entailment", "not entailment"),
)
RTE_PAPER = as_in_paper(RTE_GEN)

WNLI = Task(
    benchmark="wnli",
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
)
WNLI_GEN = generated(
    WNLI, template="{instruction}\n\n### Sentence and Resolution:\n{inputs}\n\n### Answer:\n"
)
WNLI_PAPER = as_in_paper(WNLI_GEN)

TASKS = (
    *(COLA, COLA_GEN, COLA_PAPER),
    *(SST2, SST2_GEN, SST2_PAPER),
    *(MRPC, MRPC_GEN, MRPC_PAPER),
    *(STSB, STSB_GEN, STSB_PAPER),
    *(QQP, QQP_GEN, QQP_PAPER),
    *(MNLI, MNLI_GEN, MNLI_PAPER),
    *(MNLI_MISMATCHED, MNLI_MISMATCHED_GEN),
    *(QNLI, QNLI_GEN, QNLI_PAPER),
    *(RTE, RTE_GEN, RTE_PAPER),
    *(WNLI, WNLI_GEN, WNLI_PAPER),
)
