"""Written answers, from lm-eval's request to lm-eval's score."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from sklearn.metrics import matthews_corrcoef
from task_rows import write_data
from tiny import tiny_llama, tiny_tokenizer

from moelora_eval_tasks.catalog import GROUPS, PREFIX
from moelora_plugin.evaluation.lm import wrap


class Scripted(LM):
    """Writes what it is told to, given a request's document."""

    def __init__(self, write: Callable[[dict[str, Any]], str]) -> None:
        super().__init__()
        self.write = write

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [self.write(request.doc) for request in requests]

    def loglikelihood(self, requests: list[Instance]) -> Any:
        raise AssertionError("nothing is scored by log-likelihood")

    loglikelihood_rolling = loglikelihood


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    folder = write_data(tmp_path_factory.mktemp("data"), [*GROUPS["text_gen"], *GROUPS["paper"]])
    return TaskManager(
        include_path=str(files("moelora_eval_tasks")),
        include_defaults=False,
        metadata={"data_dir": str(folder)},
    )


def run(lm: LM, manager: TaskManager, name: str) -> dict[str, Any]:
    loaded = manager.load([PREFIX + name])
    results = evaluate(lm, loaded, bootstrap_iters=0)
    assert results is not None
    return results


def right(doc: dict[str, Any]) -> str:
    return str(doc["choices"][doc["gold"]])


@pytest.mark.parametrize("group", ["text_gen", "paper"])
def test_right_answers_score_one_on_every_task_and_in_the_group(
    group: str, manager: TaskManager
) -> None:
    def write(doc: dict[str, Any]) -> str:
        return f"{right(doc)} And so on\n\n### Comment"

    results = run(Scripted(write), manager, group)
    for name in GROUPS[group]:
        row = results["results"][PREFIX + name]
        assert row["parsed,none"] == 1
        assert row["score,none"] == 1
    assert results["groups"][PREFIX + group]["score,none"] == 1


def test_a_group_is_the_mean_of_its_tasks_scores(manager: TaskManager) -> None:
    def write(doc: dict[str, Any]) -> str:
        return right(doc) if doc["task"] in ("siqa_gen", "openbookqa_gen") else "Perhaps."

    results = run(Scripted(write), manager, "qa_gen")
    scores = [results["results"][PREFIX + name]["score,none"] for name in GROUPS["qa_gen"]]
    assert scores == [0, 0, 1, 1]
    assert results["groups"][PREFIX + "qa_gen"]["score,none"] == 0.5


def test_the_papers_cola_multiplies_correlation_and_share(manager: TaskManager) -> None:
    written = iter(["correct", "wrong", "wrong", "purple"])  # the labels are 1, 0, 1, 0
    lm = Scripted(lambda doc: f"The sentence is grammatically {next(written)}.")
    row = run(lm, manager, "cola_paper")["results"][PREFIX + "cola_paper"]
    expected = matthews_corrcoef([1, 0, 1], [1, 0, 0]) * 3 / 4
    assert row["mcc_x_parsed,none"] == row["score,none"] == pytest.approx(expected)
    assert row["parsed,none"] == 0.75


def _generated(manager: TaskManager, **settings: Any) -> tuple[list[str], list[torch.Tensor]]:
    """What a tiny model writes, and the tokens that it was given."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    model.config.max_position_embeddings = settings.pop("max_length", 2048)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    given: list[torch.Tensor] = []
    generate = model.generate

    def spied(**options: Any) -> torch.Tensor:
        given.append(options["input_ids"])
        written = generate(**options)
        assert written.shape[1] - options["input_ids"].shape[1] <= 10
        return written

    model.generate = spied
    results = run(wrap(model, tokenizer, 2), manager, "sst2_gen")
    samples = results["samples"][PREFIX + "sst2_gen"]
    return [sample["filtered_resps"][0] for sample in samples], given


def test_ten_tokens_are_written_greedily_whatever_the_model_prefers(
    manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    plain, _ = _generated(manager)
    caplog.clear()
    sampling = {"do_sample": True, "temperature": 1.5, "top_p": 0.5, "repetition_penalty": 9.0}
    caplog.set_level(logging.WARNING, "transformers")
    assert _generated(manager, **sampling, max_new_tokens=300)[0] == plain
    assert len(set(plain)) > 1
    assert not [record for record in caplog.records if record.name.startswith("transformers")]


def test_a_prompt_that_is_too_long_keeps_its_end(manager: TaskManager) -> None:
    tokenizer = tiny_tokenizer()
    _, given = _generated(manager, max_length=40)
    assert {tokens.shape[1] for tokens in given} == {30}
    for row in torch.cat(given):
        assert tokenizer.decode(row).endswith("### Answer:\n")
    assert np.unique(torch.cat(given)[:, 0]).tolist() != [tokenizer.bos_token_id]
