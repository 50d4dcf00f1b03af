"""`moelora report`."""

from __future__ import annotations

from pathlib import Path

import pytest
from scored_runs import write_run
from typer.testing import CliRunner

from moelora_cli.main import app


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


def test_a_page_and_markdown_are_written(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "moelora_eval.json")
    write_run(tmp_path / "b.json")
    page, markdown = tmp_path / "out" / "page.html", tmp_path / "scores.md"
    code, output = run(
        *(tmp_path / "a", f"ours={tmp_path / 'b.json'}", "--out", page, "--markdown", markdown)
    )
    assert code == 0, output
    assert output == f"Written to {page} Written to {markdown}"
    assert "<h1>a · ours</h1>" in page.read_text(encoding="utf-8")
    assert "| task | rows | metric | protocol | base | a | ours |" in markdown.read_text()


def test_a_page_that_is_there_stays(tmp_path: Path) -> None:
    source = write_run(tmp_path / "moelora_eval.json")
    page = tmp_path / "report.html"
    assert run(source, "--out", page)[0] == 0
    written = page.read_bytes()
    code, output = run(source, "--out", page, "--documents", "1")
    assert code == 1
    assert "already holds something; choose another --out or pass --overwrite" in output
    assert page.read_bytes() == written
    assert run(source, "--out", page, "--documents", "1", "--overwrite")[0] == 0
    assert page.read_bytes() != written


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["one.json", "one.json"], "one.json is given twice"),
        (["x=one.json", "x=two.json"], "2 runs are called x; give each a name of its own"),
        (["one.json", "other.json"], "were not scored on the same rows"),
        (["one.json", "--documents", "-1"], "documents is -1, expected at least 0"),
        (["broken.json"], "is not a file that `moelora eval` has written"),
        (["moved.json"], "is not the file that was written with its moelora_eval.json"),
    ],
)
def test_bad_input_is_one_sentence_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two", "moved"):
        write_run(tmp_path / f"{name}.json")
    write_run(tmp_path / "other.json", right={"sst2": {"base": [True], "adapter": [True]}})
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "moved_documents.parquet").write_bytes(b"other rows")
    code, output = run(*arguments, "--out", "page.html", "--markdown", "scores.md")
    assert code == 1
    assert output.startswith("Error: ")
    assert said in output
    assert not (tmp_path / "page.html").exists()
    assert not (tmp_path / "scores.md").exists()
