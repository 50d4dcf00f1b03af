"""The tasks with images: which rows, in which order, shown how, grouped how."""

from __future__ import annotations

import textwrap
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from task_rows import ROWS, write_data, write_split
from vision_rows import SCIENCEQA_IMAGE, VISUAL7W

from moelora_eval_tasks.catalog import GROUPS, TASKS, Task, canonical
from moelora_eval_tasks.loading import load_for_lm_eval, load_split
from moelora_eval_tasks.prompts import IMAGE_PLACEHOLDER, render
from moelora_plugin.errors import DataError
from moelora_plugin.evaluation.harness import load_tasks

VMCBENCH, VISUAL7W_TASK = TASKS["vmcbench"], TASKS["visual7w"]
SUFFIXES = ("", "_gen", "_paper")


class Scripted(LM):
    """Writes one text, or finds it the likeliest answer, and looks at every image."""

    MULTIMODAL = True

    def __init__(self, text: str = "") -> None:
        super().__init__()
        self.text = text
        self.sizes: Counter[Any] = Counter()

    def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
        self._look(requests)
        return [self.text] * len(requests)

    def loglikelihood(self, requests: list[Instance], **_: Any) -> list[tuple[float, bool]]:
        self._look(requests)
        return [(float(request.args[1] == self.text), False) for request in requests]

    def loglikelihood_rolling(self, requests: Any, **_: Any) -> Any:
        raise NotImplementedError

    def _look(self, requests: list[Instance]) -> None:
        for request in requests:
            self.sizes[tuple(image.size for image in request.args[2]["visual"])] += 1


def results_of(lm: Scripted, name: str, data_dir: Path, **options: Any) -> dict[str, Any]:
    loaded = load_tasks([name], str(data_dir), **options)
    found: Any = evaluate(lm, loaded.lm_eval, bootstrap_iters=0)
    return found["results"][f"moelora_{name}"]


def test_the_groups() -> None:
    assert GROUPS["vision"] == ("scienceqa_image", "vmcbench", "visual7w")
    assert GROUPS["vision_gen"] == tuple(f"{name}_gen" for name in GROUPS["vision"])
    assert GROUPS["paper_vision"] == ("vmcbench_paper", "visual7w_paper")
    assert all(TASKS[name].shows_images for name in (*GROUPS["vision"], *GROUPS["paper_vision"]))
    assert canonical("Visual-7W") == "visual7w"
    assert canonical("VMCBench_gen") == "vmcbench_gen"
    assert canonical("ScienceQA-Image") == "scienceqa_image"


def test_the_files_of_all_tasks_that_show_images_and_of_no_others_say_so() -> None:
    hook = "doc_to_image: !function moelora_eval_tasks.images.pictures\n"
    root = Path(str(files("moelora_eval_tasks")))
    showing = {path.stem for path in root.rglob("*.yaml") if hook in path.read_text("utf-8")}
    assert showing == {name for name, task in TASKS.items() if task.shows_images}


@pytest.mark.parametrize("protocol", ["", "_gen"])
def test_scienceqa_is_its_rows_without_and_then_with_an_image(
    protocol: str, tmp_path: Path
) -> None:
    task = TASKS[f"scienceqa_all{protocol}"]
    data_dir = write_data(tmp_path, [task.name])
    text = [row for row in ROWS["scienceqa"] if row["image"] is None]
    shown = [row for row in SCIENCEQA_IMAGE if row["image"] is not None]
    for split in ("train", "test"):
        rows = load_split(task, split, data_dir)
        assert rows["question"] == [row["question"] for row in (*text, *shown)]
        assert [row is not None for row in rows["image"]] == [False] * len(text) + [True] * 3
    docs = load_for_lm_eval(task.name, str(data_dir))["evaluation"]
    alone = [
        *load_for_lm_eval(f"scienceqa{protocol}", str(data_dir))["evaluation"],
        *load_for_lm_eval(f"scienceqa_image{protocol}", str(data_dir))["evaluation"],
    ]
    assert [(doc["context"], doc["choices"], doc["gold"]) for doc in docs] == [
        (doc["context"], doc["choices"], doc["gold"]) for doc in alone
    ]
    counts = [doc["context"].count(IMAGE_PLACEHOLDER) for doc in docs]
    assert counts == [0] * len(text) + [1] * 3  # though a question has the placeholder in it


@pytest.mark.parametrize(
    ("name", "scored", "trained"),
    [
        ("vmcbench_paper", range(900, 904), range(900)),
        ("vmcbench_gen", range(904), None),
        ("vmcbench", range(904), None),
    ],
)
def test_vmcbench_scores_all_its_rows_or_those_the_paper_does_not_train_on(
    name: str, scored: range, trained: range | None, tmp_path: Path
) -> None:
    task = TASKS[name]
    rows = [row | {"question": f"{i}"} for i, row in enumerate(ROWS["vmcbench"])]
    write_split(tmp_path, name, "dev", rows)
    assert [int(text) for text in load_split(task, "dev", tmp_path)["question"]] == list(scored)
    if trained is None:
        with pytest.raises(DataError, match=rf"{name} has no rows to train on, .*data\.tasks"):
            load_split(task, "train", tmp_path)
    else:
        assert [int(text) for text in load_split(task, "train", tmp_path)["question"]] == list(
            trained
        )


def test_the_paper_scores_the_first_hundred_rows_of_visual7w(tmp_path: Path) -> None:
    rows = [VISUAL7W[0] | {"qa_id": i} for i in range(130)]
    write_split(tmp_path, "visual7w", "test", rows)
    assert load_split(TASKS["visual7w_paper"], "test", tmp_path)["qa_id"] == list(range(100))
    assert len(load_split(TASKS["visual7w_gen"], "test", tmp_path)) == 130


def test_options_are_shuffled_by_the_questions_id_alone(tmp_path: Path) -> None:
    rows = [VISUAL7W[0] | {"qa_id": i} for i in range(200)]

    def shown(name: str, some: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
        write_split(tmp_path, "visual7w", "test", some)
        docs = load_for_lm_eval(name, str(tmp_path), **options)["evaluation"]
        ids = load_split(TASKS[name], "test", tmp_path, **options)["qa_id"]
        return {key: (doc["options"], doc["gold"]) for key, doc in zip(ids, docs, strict=True)}

    every = shown("visual7w", rows)
    for options, gold in every.values():
        assert options[gold] == "A cup."
        assert sorted(options) == sorted(VISUAL7W[0]["choices"])
    counts = Counter(gold for _, gold in every.values())
    # 200 fair draws of four: 50 each, and four standard deviations of sqrt(200 * 3 / 16) = 6.1.
    assert all(abs(counts[gold] - 50) < 25 for gold in range(4))
    assert len({tuple(options) for options, _ in every.values()}) == 24  # of 4! orders
    assert shown("visual7w", rows[::-1]) == every
    assert shown("visual7w_gen", rows) == every
    drawn = shown("visual7w", rows, limit=50, seed=3)
    assert len(drawn) == 50
    assert drawn == {key: every[key] for key in drawn}
    # The prompt says the same.
    prompt = render(TASKS["visual7w_gen"], rows[5])
    letter = "ABCD"[every[5][1]]
    assert f"\n{letter}. A cup.\n" in prompt.context
    assert prompt.choices[prompt.gold] == f" The answer is {letter}."


def test_scores_are_grouped_by_the_kind_of_question(tmp_path: Path) -> None:
    data_dir = str(write_data(tmp_path, ["vmcbench", "visual7w"]))
    areas = load_for_lm_eval("vmcbench", data_dir)["evaluation"]["category"]
    assert areas[:4] == ["general", "doc", "ocr", "reasoning"]
    kinds = load_for_lm_eval("visual7w", data_dir)["evaluation"]["category"]
    assert kinds == ["what", "where", "who", "how", "when", "why"]
    # Twenty sets in four areas, as in the benchmark's paper.
    assert Counter(dict(VMCBENCH.categories).values()) == {
        "general": 7,
        "reasoning": 6,
        "ocr": 2,
        "doc": 5,
    }
    assert len(dict(VMCBENCH.categories)) == 20


@pytest.mark.parametrize(
    "task", [TASKS[f"{name}{end}"] for name in ("vmcbench", "visual7w") for end in SUFFIXES]
)
def test_the_readmes_show_the_prompts(task: Task) -> None:
    prompt = render(task, ROWS[task.benchmark][0])
    readme = files("moelora_eval_tasks").joinpath(task.folder, "README.md").read_text("utf-8")
    assert f"\n{textwrap.indent(prompt.context.strip(), '    ')}\n" in readme
    assert f"`{task.name}`" in readme


def test_visual7w_is_not_looked_for_on_the_hub() -> None:
    with pytest.raises(DataError, match=r"not on the hub; .*`moelora data prepare visual7w"):
        load_split(VISUAL7W_TASK, "test")


def test_lm_eval_shows_the_images_and_reads_the_answers(tmp_path: Path) -> None:
    data_dir = write_data(tmp_path, ["vmcbench_paper", "scienceqa_all"])
    found = results_of(Scripted("The answer is B."), "vmcbench_paper", data_dir)
    assert (found["acc,none"], found["parsed,none"]) == (0.25, 1)
    write_split(data_dir, "vmcbench", "dev", ROWS["vmcbench"][:8])
    lm = Scripted("(D) or, on a second look, (B)")
    found = results_of(lm, "vmcbench_gen", data_dir)
    assert (found["acc,none"], found["parsed,none"]) == (0.25, 1)
    assert lm.sizes == {((12, 8),): 8}
    lm = Scripted(" A")
    found = results_of(lm, "scienceqa_all", data_dir)
    assert found["acc,none"] == 3 / 6
    assert lm.sizes == {(): 2 + 3 + 2, ((12, 8),): 3 + 2 + 2}


def test_a_miss_is_wrong_unless_a_guess_is_asked_for(tmp_path: Path) -> None:
    write_split(tmp_path, "vmcbench", "dev", ROWS["vmcbench"][:100])
    lm = Scripted("I cannot say")
    found = results_of(lm, "vmcbench_gen", tmp_path)
    assert (found["acc,none"], found["parsed,none"]) == (0, 0)
    found = results_of(lm, "vmcbench_gen", tmp_path, guess=True)
    # 100 fair draws of four: 0.25, and four standard errors of sqrt(3 / 16 / 100) = 0.043.
    assert abs(found["acc,none"] - 0.25) < 0.173
