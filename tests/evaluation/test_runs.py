"""Runs read back from their files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from peft import PeftModel
from tiny import tiny_tokenizer
from written_runs import write_run

from moelora_plugin.errors import ConfigError
from moelora_plugin.evaluation import evaluate_model
from moelora_plugin.reports.runs import read_run


def test_a_run_is_what_was_written(adapter: PeftModel, data_dir: str, output: Path) -> None:
    report = evaluate_model(
        adapter, tiny_tokenizer(), ["qa", "stsb"], data_dir=data_dir, compare_base=True
    ).write(output)
    run = read_run(output)
    assert (run.path, run.reference) == (output, "base")
    assert run.tasks == report.tasks
    assert run.groups == report.groups
    assert run.models == json.loads(json.dumps(report.models))
    assert run.details["versions"] == report.details["versions"]
    for model, found in report.predictions.items():
        for task, predictions in found.items():
            rows = run.predictions[task]
            assert rows.prompts_sha256 == predictions.prompts_sha256
            np.testing.assert_array_equal(rows.label, predictions.label)
            np.testing.assert_array_equal(rows.preds[model], predictions.pred)


def test_a_folder_stands_for_the_file_in_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"base": 0.6})
    assert read_run(folder).path == folder / "moelora_eval.json"
    assert read_run(str(folder)).reference is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"run\.json does not exist; name a file that `moelora eval` has written\.$"),
        (
            "no JSON",
            r"is not a file that `moelora eval` has written \(it is not valid JSON .*\); ",
        ),
        ("[1, 2]", r"is not a file that `moelora eval` has written; name one that is\.$"),
        ('{"name": "something else"}', r"is not a file that `moelora eval` has written; name one"),
        (
            '{"format_version": 1}',
            r"has format version 1, this moelora reads 2; run `moelora eval`",
        ),
        ('{"format_version": 2}', r"is incomplete or was changed: models is missing; run"),
    ],
)
def test_what_is_no_run_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_run(file)


def test_a_file_with_rows_missing_is_refused(tmp_path: Path) -> None:
    file = write_run(tmp_path, {"base": 0.6}) / "moelora_eval.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["predictions"]["rte"]["models"]["base"].pop()
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"predictions\.rte\.models\.base is .* each of 120 rows"):
        read_run(file)
