"""The batch size: chosen, halved where memory runs out, and without influence on the scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny import tiny_llama, tiny_tokenizer

from moelora_eval_tasks.catalog import TASKS
from moelora_plugin.errors import ConfigError
from moelora_plugin.evaluation import EvaluationReport, evaluate_model
from moelora_plugin.evaluation.lm import shared

NAMES = ["scienceqa", "sst2", "stsb", "sst2_gen"]


def same(one: EvaluationReport, other: EvaluationReport, name: str) -> None:
    pair = [report.predictions["model"][name] for report in (one, other)]
    # A rating is a real number: padding changes it by rounding (fp32), the others not at all.
    tolerance = 1e-5 if TASKS[name].rating else 0
    np.testing.assert_allclose(pair[0].pred, pair[1].pred, atol=tolerance)
    assert pair[0].answers == pair[1].answers


@pytest.fixture
def tokens_seen(adapter: PeftModel) -> list[int]:
    """Rows times positions of every call of the model."""
    seen: list[int] = []
    embedding = adapter.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))
    return seen


def limit_memory(model: Any, tokens: int) -> None:
    """Let a model's memory be enough for so many tokens at once."""

    def refuse(module: Any, args: Any) -> None:
        if args[0].numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    model.get_input_embeddings().register_forward_pre_hook(refuse)


def test_no_batch_size_changes_a_score(adapter: PeftModel, data_dir: str) -> None:
    one, four, auto = (
        evaluate_model(adapter, tiny_tokenizer(), NAMES, data_dir=data_dir, batch_size=size)
        for size in (1, 4, "auto")
    )
    for name in one.tasks:
        same(one, four, name)
        same(one, auto, name)
    # Without an end to what it writes, the texts differ from row to row, which padding could upset.
    assert len(set(one.predictions["model"]["sst2_gen"].answers)) > 1
    assert set(one.details["batch_sizes"]["model"].values()) == {1}
    assert set(four.details["batch_sizes"]["model"].values()) == {4}


@pytest.mark.parametrize("name", ["sst2", "sst2_gen"])
def test_auto_fills_a_pass_with_tokens_and_no_more(
    adapter: PeftModel,
    data_dir: str,
    name: str,
    tokens_seen: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def evaluated(tokens: int) -> int:
        monkeypatch.setattr(shared, "_TOKENS_ON_CPU", tokens)
        report = evaluate_model(adapter, tiny_tokenizer(), [name], data_dir=data_dir)
        return report.details["batch_sizes"]["model"][name]

    assert evaluated(10) == 1  # a row is never cut
    longest = max(tokens_seen[2:])  # the first two look whether the adapter is applied
    tokens_seen.clear()
    written = TASKS[name].max_new_tokens if name == "sst2_gen" else 0
    # What is written counts: without it, three rows would fill the pass of a generation.
    assert evaluated(3 * longest if written else 5 * longest // 2) == 2
    assert longest < max(tokens_seen[2:]) <= 2 * (longest + written)


def test_auto_halves_where_memory_runs_out(adapter: PeftModel, data_dir: str) -> None:
    limit_memory(adapter, 200)
    names = ["sst2", "stsb", "sst2_gen"]
    auto, one = (
        evaluate_model(adapter, tiny_tokenizer(), names, data_dir=data_dir, batch_size=size)
        for size in ("auto", 1)
    )
    for name in names:
        same(one, auto, name)
    sizes = auto.details["batch_sizes"]["model"]
    assert all(sizes[name] < 4 for name in names), sizes


def test_a_row_for_which_memory_is_not_enough_is_an_error(data_dir: str) -> None:
    model = tiny_llama()
    limit_memory(model, 60)
    with pytest.raises(ConfigError, match=r"A row of \d+ tokens does not fit into the memory of"):
        evaluate_model(model, tiny_tokenizer(), ["qa"], data_dir=data_dir)


def test_other_errors_of_the_model_are_shown(data_dir: str) -> None:
    def fail(module: Any, args: Any) -> None:
        raise RuntimeError("something else")

    model = tiny_llama()
    model.get_input_embeddings().register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="something else"):
        evaluate_model(model, tiny_tokenizer(), ["rte"], data_dir=data_dir)


def test_a_batch_size_that_is_none_is_refused(adapter: PeftModel, data_dir: str) -> None:
    with pytest.raises(ConfigError, match="batch_size is 'many', expected a whole number of at"):
        evaluate_model(adapter, tiny_tokenizer(), ["rte"], data_dir=data_dir, batch_size="many")
