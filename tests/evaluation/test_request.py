"""Requests that cannot be carried out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moelora_plugin.errors import ConfigError
from moelora_plugin.evaluation import EvaluationRequest


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": None}, "No model is given to evaluate; pass --adapter"),
        ({"compare_base": True}, "--compare-base compares an adapter with its base"),
        ({"limit": 0}, "limit is 0, expected at least 1; change --limit"),
        ({"batch_size": 0}, "batch_size is 0, expected a whole number of at least 1, or 'auto'"),
        ({"batch_size": "all"}, "batch_size is 'all', expected a whole .*; change --batch-size"),
    ],
)
def test_values_that_do_not_go_together_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EvaluationRequest(**{"tasks": ("sst2",), "base": "a/model", **change})


def test_the_output_is_a_file_or_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def output(path: Path | None) -> Path:
        return EvaluationRequest(tasks=("sst2",), base="a/model", output=path).output_file()

    monkeypatch.chdir(tmp_path)
    assert output(None) == Path("moelora_eval.json")
    assert output(tmp_path) == tmp_path / "moelora_eval.json"
    assert output(tmp_path / "new") == tmp_path / "new" / "moelora_eval.json"
    assert output(tmp_path / "scores.json") == tmp_path / "scores.json"


def test_an_existing_output_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    (tmp_path / "moelora_eval.json").write_text('{"format_version": 1, "tasks": {}}')
    request = {"tasks": ("sst2",), "base": "a/model", "output": tmp_path}
    with pytest.raises(ConfigError, match=r"already holds something; choose another --output or"):
        EvaluationRequest(**request).output_file()
    assert EvaluationRequest(**request, overwrite=True).output_file().exists()
