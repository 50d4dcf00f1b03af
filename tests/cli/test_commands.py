"""Each command hands its options to one library function and displays what that returns."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from typer.testing import CliRunner

from moelora_cli.main import app
from moelora_plugin.errors import ConfigError

runner = CliRunner()


@pytest.fixture(autouse=True)
def _no_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOELORA_DATA_DIR", raising=False)


@pytest.fixture
def boundary(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace a library module by a stub: the commands import it when they run."""

    def install(module: str, **functions: Any) -> None:
        stub = ModuleType(module)
        vars(stub).update(functions)
        monkeypatch.setitem(sys.modules, module, stub)

    return install


def result_with_table(**attributes: Any) -> SimpleNamespace:
    return SimpleNamespace(table=lambda: "THE TABLE", **attributes)


def test_train(boundary: Any) -> None:
    load_recipe, train = Mock(return_value="the recipe"), Mock(return_value=result_with_table())
    boundary("moelora_plugin.training", load_recipe=load_recipe, train=train)
    arguments = ["r.yaml", "a=1", "b.c=2", "--data-dir", "d", "--output-dir", "o"]
    result = runner.invoke(app, ["train", *arguments, "--resume", "last", "--overwrite"])
    assert result.exit_code == 0, result.output
    load_recipe.assert_called_once_with(
        Path("r.yaml"), ["a=1", "b.c=2"], data_dir="d", output_dir="o"
    )
    train.assert_called_once_with("the recipe", overwrite=True, resume="last")
    assert "THE TABLE" in result.output


def test_eval(boundary: Any) -> None:
    request, evaluate = Mock(), Mock(return_value=result_with_table(path=Path("e.json")))
    boundary("moelora_plugin.evaluation", EvaluationRequest=request, evaluate=evaluate)
    arguments = ["--adapter", "a", "--tasks", "glue, siqa", "--base", "b", "--limit", "5"]
    arguments += ["--batch-size", "2", "--compare-base", "--output", "e.json", "--overwrite"]
    arguments += ["--dtype", "float32", "--device", "cpu", "--seed", "7", "--allow-base-mismatch"]
    arguments += ["--guess", "--no-cache"]
    result = runner.invoke(app, ["eval", *arguments], env={"MOELORA_DATA_DIR": "rows"})
    assert result.exit_code == 0, result.output
    request.assert_called_once_with(
        tasks=("glue", "siqa"),
        adapters=("a",),
        base="b",
        data_dir="rows",
        limit=5,
        batch_size=2,
        compare_base=True,
        dtype="float32",
        device="cpu",
        guess=True,
        seed=7,
        output=Path("e.json"),
        overwrite=True,
        allow_base_mismatch=True,
        cache=False,
    )
    evaluate.assert_called_once_with(request.return_value)
    assert "THE TABLE" in result.output
    assert "Written to e.json" in result.output


def test_export(boundary: Any) -> None:
    export_adapter = Mock(return_value=result_with_table())
    boundary("moelora_plugin.export", export_adapter=export_adapter)
    arguments = ["a", "--out", "o", "--to", "merged", "--strategy", "mean-gate"]
    arguments += ["--calibration-tasks", "sst2,rte", "--eval-file", "e.json", "--overwrite"]
    result = runner.invoke(app, ["export", *arguments, "--push-to-hub", "me/it"])
    assert result.exit_code == 0, result.output
    export_adapter.assert_called_once_with(
        "a",
        Path("o"),
        to="merged",
        strategy="mean-gate",
        base=None,
        eval_file=Path("e.json"),
        calibration_tasks=("sst2", "rte"),
        data_dir=None,
        push_to_hub="me/it",
        overwrite=True,
        dtype="auto",
    )
    assert "THE TABLE" in result.output


def test_demo(boundary: Any) -> None:
    run_demo = Mock(return_value=result_with_table())
    boundary("moelora_plugin.demo", run_demo=run_demo)
    result = runner.invoke(app, ["demo", "--out", "o", "--steps", "3", "--seed", "1"])
    assert result.exit_code == 0, result.output
    run_demo.assert_called_once_with(Path("o"), data_dir=None, steps=3, overwrite=False, seed=1)
    assert "THE TABLE" in result.output


def test_inspect(boundary: Any) -> None:
    inspect_adapter = Mock(return_value=result_with_table())
    boundary("moelora_plugin.analysis", inspect_adapter=inspect_adapter)
    result = runner.invoke(app, ["inspect", "a"])
    assert result.exit_code == 0, result.output
    inspect_adapter.assert_called_once_with("a")
    assert "THE TABLE" in result.output


def test_doctor_shows_what_to_do_with_its_brackets(boundary: Any) -> None:
    finding = SimpleNamespace(
        name="lm_eval", status="missing", detail="not installed", remedy="moelora[eval]"
    )
    boundary("moelora_plugin.analysis.doctor", diagnose=lambda: [finding])
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    for text in ("lm_eval", "missing", "not installed", "moelora[eval]"):
        assert text in result.output


def test_an_error_is_one_red_sentence_and_exit_code_1(boundary: Any) -> None:
    message = "top_k is 30, but at most\nnum_experts = 20 can be selected; change adapter.top_k."
    boundary("moelora_plugin.training", load_recipe=Mock(side_effect=ConfigError(message)), train=0)
    result = runner.invoke(app, ["train", "r.yaml"])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == f"Error: {message.replace(chr(10), ' ')}\n"


def test_an_error_is_red_on_a_terminal(boundary: Any) -> None:
    boundary("moelora_plugin.training", load_recipe=Mock(side_effect=ConfigError("x")), train=0)
    result = runner.invoke(app, ["train", "r.yaml"], env={"FORCE_COLOR": "1", "TERM": "xterm"})
    assert result.stderr == "\x1b[31mError: x\x1b[0m\n"


def test_debug_lets_the_error_through(boundary: Any) -> None:
    boundary("moelora_plugin.training", load_recipe=Mock(side_effect=ConfigError("x")), train=0)
    result = runner.invoke(app, ["--debug", "train", "r.yaml"])
    assert isinstance(result.exception, ConfigError)


def test_an_unexpected_error_is_not_hidden(boundary: Any) -> None:
    boundary("moelora_plugin.training", load_recipe=Mock(side_effect=KeyError("bug")), train=0)
    assert isinstance(runner.invoke(app, ["train", "r.yaml"]).exception, KeyError)


def test_ctrl_c_ends_without_a_traceback(boundary: Any) -> None:
    boundary("moelora_plugin.training", load_recipe=Mock(side_effect=KeyboardInterrupt), train=0)
    result = runner.invoke(app, ["train", "r.yaml"])
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
