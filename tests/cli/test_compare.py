"""`moelora compare`, from files to a table and a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner
from written_runs import write_run

from moelora_cli.main import app

runner = CliRunner()


@pytest.fixture(autouse=True)
def _width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    good = write_run(tmp_path / "good", {"base": 0.6, "adapter": 0.9})
    return [str(good), str(write_run(tmp_path / "poor", {"base": 0.6, "adapter": 0.62}, seed=2))]


@pytest.fixture
def seeds(tmp_path: Path) -> list[str]:
    return [
        f"{recipe}={write_run(tmp_path / f'{recipe}{seed}', {'adapter': share}, seed=seed)}"
        for recipe, share in (("ours", 0.9), ("lora", 0.7))
        for seed in (1, 2, 3)
    ]


def test_models_side_by_side(runs: list[str], tmp_path: Path) -> None:
    output = tmp_path / "comparison.json"
    result = runner.invoke(app, ["compare", *runs, "--output", str(output)])
    assert result.exit_code == 0, result.output
    content = json.loads(output.read_text(encoding="utf-8"))
    difference = content["tasks"]["sst2"]["differences"]["good"]
    table, _, notes = result.output.partition("\nWithin noise")
    assert f"{100 * difference['value']:+.2f} [{100 * difference['low']:+.2f}, " in table
    assert f"{difference['p_value_holm']:.2g}" in table
    assert "difference from base" in table
    assert "poor on sst2 (" in notes
    assert max(map(len, table.splitlines())) <= 80
    assert content["reference"] == "base"
    assert content["models"]["poor"] == {"file": f"{runs[1]}/moelora_eval.json", "model": "adapter"}


def test_recipes_over_seeds(seeds: list[str], tmp_path: Path) -> None:
    output = tmp_path / "comparison.json"
    arguments = ["--reference", "lora", "--output", str(output)]
    result = runner.invoke(app, ["compare", *seeds, *arguments])
    assert result.exit_code == 0, result.output
    content = json.loads(output.read_text(encoding="utf-8"))
    mean, difference = content["means"]["rte"]["ours"], content["differences"]["rte"]["ours"]
    for shown in (
        f"{100 * mean['mean']:.2f}",
        f"[{100 * mean['low']:.2f}, {100 * mean['high']:.2f}]",
        f"[{100 * difference['low']:+.2f}, {100 * difference['high']:+.2f}]",
        f"[{100 * difference['rows_low']:+.2f}, {100 * difference['rows_high']:+.2f}]",
        f"{difference['p_value_holm']:.2g}",
    ):
        assert shown in result.output
    assert max(map(len, result.output.splitlines()[:-1])) <= 80
    assert len(content["recipes"]["ours"]) == 3


def test_an_output_is_kept_unless_told_otherwise(runs: list[str], tmp_path: Path) -> None:
    output = tmp_path / "comparison.json"
    arguments = ["compare", *runs, "--output", str(output)]
    assert runner.invoke(app, arguments).exit_code == 0
    written = output.read_bytes()
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    assert "already holds something; choose another --output or pass --overwrite" in result.stderr
    assert output.read_bytes() == written
    assert runner.invoke(app, [*arguments, "--overwrite", "--seed", "1"]).exit_code == 0
    assert output.read_bytes() != written


def test_what_cannot_be_compared_is_one_line_and_no_file(runs: list[str], tmp_path: Path) -> None:
    output = tmp_path / "comparison.json"
    for wrong in ([*runs, "nowhere"], [*runs, "--reference", "other"]):
        result = runner.invoke(app, ["compare", *wrong, "--output", str(output)])
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ")
        assert len(result.stderr.splitlines()) == 1
        assert not output.exists()
