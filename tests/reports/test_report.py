"""The table in the terminal and the Markdown."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scored_runs import hits, scored, write_run

from moelora_plugin.evaluation.report import EvaluationReport, show_difference, shown_metrics
from moelora_plugin.evaluation.statistics import Estimate
from moelora_plugin.reports.compare import read_runs
from moelora_plugin.reports.markdown import score_table
from moelora_plugin.reports.scoreboard import Scoreboard, scoreboard

RIGHT = {
    task: {"base": hits(400, 0.5, i), "moe": hits(400, 0.5, 9 + i), "lora": hits(400, 0.9, 19 + i)}
    for i, task in enumerate(("commonsenseqa", "mrpc", "rte"))
}


def printed(report: EvaluationReport, width: int = 80) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(report.table())
    return console.export_text().splitlines()


def board_of(path: Path) -> Scoreboard:
    return scoreboard({name: runs[0] for name, runs in read_runs([str(path)]).items()})


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    report = scored(RIGHT)
    lines = printed(report)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for task, measured in report.tasks.items():
        for model, estimates in measured.metrics.items():
            shown = f"{100 * estimates['score'].value:.2f} ± {100 * estimates['score'].stderr:.2f}"
            assert any(model in line and shown in line for line in lines), (task, model)
        for difference in measured.differences.values():
            assert show_difference(difference) in text
    assert "f1" in text


def test_a_difference_within_noise_is_marked() -> None:
    report = scored(RIGHT)
    differences = report.tasks["rte"].differences
    assert differences["moe"].within_noise
    assert not differences["lora"].within_noise
    marked = [line for line in printed(report) if "~ " in line and "%" not in line]
    assert len(marked) == 3  # a row for each task
    assert all(" moe " in line for line in marked)


@pytest.mark.parametrize(
    ("request_", "overlap", "said"),
    [
        ({"limit": 5}, {}, "At most 5 rows of each task were drawn (--limit)"),
        ({}, {"lora": {"rte": 2, "mrpc": 0}}, "trained on (how many): lora on rte (2)."),
        ({}, {}, "Within noise"),
    ],
)
def test_warnings_stand_under_the_table(
    request_: dict[str, Any], overlap: dict[str, Any], said: str
) -> None:
    report = scored(RIGHT, request=request_)
    report.details["overlap"] = overlap
    text = " ".join(" ".join(printed(report)).split())
    assert said in text
    assert text.index(said) > text.index("lora")


def test_a_full_run_of_one_model_warns_of_nothing() -> None:
    report = scored({"rte": {"base": RIGHT["rte"]["base"]}}, reference=None)
    assert report.warnings == []


def test_markdown_has_a_line_for_each_metric(tmp_path: Path) -> None:
    run = write_run(tmp_path / "moelora_eval.json", right=RIGHT, request={"limit": 400})
    board = board_of(run)
    lines = score_table(board).splitlines()
    assert lines[0] == (
        "| task | rows | metric | protocol | base | moe | lora "
        "| moe - base [95 %] | lora - base [95 %] |"
    )
    rte = board.tasks["rte"]
    (line,) = [line for line in lines if line.startswith("| rte ")]
    cells = line.strip("| ").split(" | ")
    accuracy = rte.metrics["moe"]["acc"]
    assert cells[:4] == ["rte", "400", "acc", "loglikelihood"]
    assert cells[5] == f"{100 * accuracy.value:.2f} ± {100 * accuracy.stderr:.2f}"
    assert cells[7:] == [show_difference(rte.differences[name]) for name in ("moe", "lora")]
    # Differences are of the score, so they stand in its line alone.
    f1, score = (
        line for line in lines if line.startswith(("| mrpc | 400 | f1", "| mrpc | 400 | sc"))
    )
    assert f1.endswith("|  |  |")
    assert score.count("[") == 2
    assert "up to 400 rows of a task" in lines[-2]
    assert lines[-1].startswith("`~` marks")


def test_markdown_of_some_models(tmp_path: Path) -> None:
    run = write_run(tmp_path / "moelora_eval.json", right=RIGHT)
    table = score_table(board_of(run), ["base", "lora"])
    assert "moe" not in table.splitlines()[0]
    assert "all rows" in table


def test_groups_are_means(tmp_path: Path) -> None:
    qa = ("scienceqa", "commonsenseqa", "openbookqa", "siqa")
    right = {task: {"base": hits(50, 0.4, i)} for i, task in enumerate(qa)}
    run = write_run(tmp_path / "run.json", right=right, groups=("qa",), reference=None)
    board = board_of(run)
    mean = sum(board.tasks[task].metrics["base"]["score"].value for task in qa) / 4
    assert f"| **qa** (mean) | 200 | score |  | {100 * mean:.2f} ± " in score_table(board)


def test_the_metric_that_is_the_score_stands_for_it_and_comes_last() -> None:
    one = Estimate(0.5, 0.1)
    assert shown_metrics({"acc": one, "score": one}) == ["acc"]
    assert shown_metrics({"acc": one, "parsed": one, "score": one}) == ["parsed", "acc"]
    assert shown_metrics({"acc": one, "f1": one, "score": one}) == ["acc", "f1", "score"]
    assert shown_metrics({"score": one}) == ["score"]
