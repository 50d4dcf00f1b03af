"""How far an evaluation is, on stderr."""

from __future__ import annotations

import pytest
from tiny import tiny_llama, tiny_tokenizer

from moelora_plugin.evaluation import evaluate_model
from moelora_plugin.evaluation.harness import load_tasks, predict
from moelora_plugin.evaluation.lm import wrap
from moelora_plugin.evaluation.progress import EvaluationProgress


def test_without_a_terminal_each_finished_task_is_a_line(
    data_dir: str, capfd: pytest.CaptureFixture[str]
) -> None:
    report = evaluate_model(
        tiny_llama(), tiny_tokenizer(), ["sst2", "stsb", "sst2_gen"], data_dir=data_dir
    )
    printed = capfd.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 3
    for line, (name, measured) in zip(lines, report.tasks.items(), strict=True):
        score = 100 * measured.metrics["model"]["score"].value
        assert line.startswith(f"model  {name}  {score:.2f}  ({measured.n} rows, ")
        assert line.endswith(" s)")


def test_a_terminal_has_a_bar_that_goes_away(
    data_dir: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    evaluate_model(tiny_llama(), tiny_tokenizer(), ["sst2", "rte"], data_dir=data_dir)
    shown = capfd.readouterr().err
    assert "0/8 rows" in shown
    assert "model · rte" in shown  # the last frame; those before come ten a second
    assert "8/8 rows" in shown
    assert "it/s" not in shown  # of lm-eval's bars
    assert shown.rstrip().endswith("\x1b[2K")  # the bar's line is wiped


@pytest.mark.parametrize("name", ["sst2", "stsb", "sst2_gen"])
def test_every_answer_moves_the_bar(
    data_dir: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_tasks([name], data_dir)
    lm = wrap(tiny_llama(), tiny_tokenizer(), 2)
    shares: list[float] = []
    lm.advance = shares.append
    predict(lm, loaded, loaded.tasks[0])
    assert len(shares) >= loaded.rows(name)
    assert sum(shares) == pytest.approx(1)


def test_another_process_than_the_first_shows_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    progress = EvaluationProgress(3, is_shown=False)
    progress.start()
    with progress.task("model", "sst2", 3):
        pass
    progress.say("a line")
    progress.stop()
    printed = capfd.readouterr()
    assert printed.err == printed.out == ""
