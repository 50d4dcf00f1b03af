"""lm-eval's own tasks and ours agree row by row when they are given the same prompt.

Both directions: lm-eval's prompts through our harness and scoring, and our prompts through
lm-eval's scoring.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from task_rows import ROWS, Row, write_data, write_split
from tiny import tiny_llama, tiny_tokenizer

from moelora_eval_tasks import loading
from moelora_eval_tasks.catalog import TASKS
from moelora_eval_tasks.loading import load_for_lm_eval, local_file
from moelora_eval_tasks.parsing import MISS
from moelora_plugin.evaluation import evaluate_model

# By our name of a task: the file of lm-eval's own, in its tasks folder.
THEIRS = {
    "commonsenseqa": "commonsense_qa/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "siqa": "siqa/siqa.yaml",
    "cola": "glue/cola/default.yaml",
    "sst2": "glue/sst2/default.yaml",
    "mrpc": "glue/mrpc/default.yaml",
    "qqp": "glue/qqp/default.yaml",
    "mnli": "glue/mnli/default.yaml",
    "mnli_mismatched": "glue/mnli/mismatch.yaml",
    "qnli": "glue/qnli/default.yaml",
    "rte": "glue/rte/default.yaml",
    "wnli": "glue/wnli/default.yaml",
}
# Those that choose an answer; a rating's score is no accuracy.
CHOOSING = [
    name for name, task in TASKS.items() if not (task.generates or task.rating or task.shows_images)
]
REAL_ROWS = 150


@pytest.fixture(params=["network", "drawn"])
def answers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random network often gives all rows one answer; drawn log-likelihoods give them many."""

    def draw(self: HFLM, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        return [(-random.Random(repr(tokens)).random(), False) for _, *tokens in requests]

    if request.param == "drawn":
        monkeypatch.setattr(HFLM, "_loglikelihood_tokens", draw)


def mixed(name: str, n: int = 24) -> list[Row]:
    """More rows: each takes the value of each column from one of the invented ones."""
    rng = random.Random(name)
    columns = TASKS[name].columns
    return [{key: rng.choice(ROWS[name])[key] for key in columns} for _ in range(n)]


def their_task(name: str, rows: list[Row]) -> Any:
    """lm-eval's own task, from its own file, on `rows`."""
    path = Path(lm_eval.tasks.__file__).parent / THEIRS[name]
    config = load_yaml(path, resolve_func=True)
    split = config.get("test_split", config["validation_split"])
    data = DatasetDict({split: Dataset.from_list(rows), "train": Dataset.from_list(rows)})
    return manager().load([{**config, "custom_dataset": lambda **_: data}])


def stock_task(docs: list[Row]) -> Any:
    """A multiple-choice task of lm-eval's with nothing of ours in its scoring."""
    data = DatasetDict({"test": Dataset.from_list(docs)})
    config = {
        "task": "stock",
        "output_type": "multiple_choice",
        "custom_dataset": lambda **_: data,
        "test_split": "test",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    return manager().load([config])


@cache
def manager() -> TaskManager:
    return TaskManager(include_defaults=False)


def scored(loaded: Any) -> tuple[list[Row], dict[str, float]]:
    """What lm-eval itself makes of a task: its samples and its metrics."""
    lm = HFLM(pretrained=tiny_llama(), tokenizer=tiny_tokenizer(), batch_size=4)
    results = evaluate(lm, loaded, bootstrap_iters=0)
    ((name, samples),) = results["samples"].items()
    return sorted(samples, key=lambda sample: sample["doc_id"]), results["results"][name]


def rendered(name: str, task: Any, sample: Row) -> Row:
    """A row with lm-eval's prompt, as `load_for_lm_eval` gives rows with ours."""
    gold = task.doc_to_target(sample["doc"])
    if isinstance(gold, str):  # commonsense_qa names the right answer by its letter
        gold = task.doc_to_choice(sample["doc"]).index(gold)
    return {
        "task": name,
        "context": sample["arguments"][0][0],
        "choices": [continuation for _, continuation in sample["arguments"]],
        "gold": gold,
        "options": [],
        "category": None,
        "image": None,
        "label": float(gold),
        "guess": MISS,
    }


def agree_on_their_prompt(
    name: str, rows: list[Row], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = their_task(name, rows)
    samples, metrics = scored(loaded)
    (task,) = loaded["tasks"].values()
    docs = Dataset.from_list([rendered(name, task, sample) for sample in samples])
    data = DatasetDict({loading.EVALUATION: docs})
    monkeypatch.setattr(loading, "load_for_lm_eval", lambda **_: data)
    write_split(folder, name, TASKS[name].eval_split, rows)  # for the report: what was scored
    report = evaluate_model(
        tiny_llama(), tiny_tokenizer(), [name], data_dir=str(folder), batch_size=4
    )

    ours = report.predictions["model"][name]
    if "acc" in samples[0]:
        assert (ours.pred == ours.label).tolist() == [sample["acc"] == 1 for sample in samples]
    if pairs := [sample[key] for sample in samples for key in ("f1", "mcc") if key in sample]:
        assert list(zip(ours.label, ours.pred, strict=True)) == pairs
    for metric in TASKS[name].metrics:
        value = report.tasks[name].metrics["model"][metric].value
        # scikit-learn's and ours divide in another order.
        assert value == pytest.approx(metrics[f"{metric},none"], abs=1e-12), metric


def agree_on_our_prompt(name: str, data_dir: str, limit: int | None = None) -> None:
    docs = load_for_lm_eval(task_name=name, data_dir=data_dir, limit=limit)[loading.EVALUATION]
    samples, metrics = scored(stock_task(docs.to_list()))
    report = evaluate_model(
        tiny_llama(), tiny_tokenizer(), [name], data_dir=data_dir, limit=limit, batch_size=4
    )
    ours = report.predictions["model"][name]
    right = ours.pred == ours.label
    assert right.tolist() == [sample["acc"] == 1 for sample in samples]
    assert right.mean() == pytest.approx(metrics["acc,none"], abs=1e-12)


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize("name", THEIRS)
def test_their_prompt_gives_their_scores(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agree_on_their_prompt(name, mixed(name), tmp_path, monkeypatch)


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize("name", CHOOSING)
def test_our_prompt_in_a_stock_task_gives_our_accuracy(name: str, tmp_path: Path) -> None:
    agree_on_our_prompt(name, str(write_data(tmp_path, [name])))


def has_rows(name: str, folder: str) -> bool:
    """Local copies often lack a split."""
    task = TASKS[name]
    return (Path(folder) / task.folder / f"{task.eval_split}.parquet").is_file()


@pytest.mark.data
@pytest.mark.parametrize("name", THEIRS)
def test_their_prompt_on_real_rows(
    name: str, real_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_rows(name, real_dir):
        pytest.skip(f"no rows of {name}")
    task = TASKS[name]
    rows: list[Row] = pq.read_table(local_file(task, task.eval_split, real_dir)).to_pylist()
    rows = random.Random(0).sample(rows, min(REAL_ROWS, len(rows)))
    agree_on_their_prompt(name, rows, tmp_path, monkeypatch)


@pytest.mark.data
@pytest.mark.parametrize("name", CHOOSING)
def test_our_prompt_on_real_rows(name: str, real_dir: str) -> None:
    if not has_rows(name, real_dir):
        pytest.skip(f"no rows of {name}")
    agree_on_our_prompt(name, real_dir, REAL_ROWS)
