"""VMCBench: Zhang et al., CVPR 2025, arXiv 2501.03225."""

from __future__ import annotations

from ..task import VISUAL_TEMPLATE, Task, as_in_paper, generated

# As lmms-eval and VLMEvalKit group the sets that the questions are from.
AREAS = {
    "general": ("SEEDBench", "MMStar", "A-OKVQA", "VizWiz", "MMVet", "VQAv2", "OKVQA"),
    "reasoning": ("MMMU", "MathVista", "ScienceQA", "RealWorldQA", "GQA", "MathVision"),
    "ocr": ("TextVQA", "OCRVQA"),
    "doc": ("AI2D", "ChartQA", "DocVQA", "InfoVQA", "TableVQABench"),
}

VMCBENCH = Task(
    benchmark="vmcbench",
    summary="twenty visual question sets made multiple choice",
    hub_id="suyc21/VMCBench",
    revision="fa7dbfaa539054d5a0f8687b27a3e58a3d288ded",
    folder="vmcbench",
    train_split=None,
    eval_split="dev",
    eval_rows=1000,
    instruction="Choose the option that answers the question about the image.",
    inputs=(("Question", "question"),),
    label="answer",
    labels=("A", "B", "C", "D"),
    options=("A", "B", "C", "D"),
    image="image",
    category="category",
    categories=tuple((source, area) for area, sources in AREAS.items() for source in sources),
)
VMCBENCH_GEN = generated(
    VMCBENCH,
    # The official one, of lmms-eval and VLMEvalKit.
    template="{image}Question: {question}\nOptions:\n{options}\n"
    "Answer with the option's letter from the given choices directly.\n",
    option="{letter}. {text}",
    answer="{}",
    parser="vmcbench",
    max_new_tokens=32,
)
VMCBENCH_PAPER = as_in_paper(
    generated(
        VMCBENCH,
        template=VISUAL_TEMPLATE,
        option="{letter}. {text}",
        preface=" ",
        answer="The answer is {}.",
    ),
    summary="VMCBench, the last hundred rows; the others are trained on",
    train_split="dev",
    train_slice=":900",
    eval_slice="900:",
    eval_rows=100,
)

TASKS = (VMCBENCH, VMCBENCH_GEN, VMCBENCH_PAPER)
