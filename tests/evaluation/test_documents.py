"""The documents beside a run's file."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from peft import PeftModel
from PIL import Image
from scored_runs import picture, scored, write_run
from tiny import tiny_tokenizer

from moelora_plugin.errors import ConfigError, DataError
from moelora_plugin.evaluation import documents as in_parquet
from moelora_plugin.evaluation import evaluate_model, report
from moelora_plugin.evaluation.documents import _schema, read_documents
from moelora_plugin.files import sha256_of


def test_each_row_has_its_prompt_and_what_each_model_answered(
    adapter: PeftModel, data_dir: str, output: Path
) -> None:
    tasks = ["sst2", "openbookqa", "stsb", "sst2_gen"]
    written = evaluate_model(
        adapter, tiny_tokenizer(), tasks, data_dir=data_dir, compare_base=True
    ).write(output)
    record = json.loads(output.read_text())["documents"]
    file = output.with_name(record["file"])
    assert record == {"file": "moelora_eval_documents.parquet", "sha256": sha256_of(file)}
    documents = read_documents(
        file,
        record["sha256"],
        {name: one.n for name, one in written.tasks.items()},
        ["base", "model"],
    )
    assert list(documents) == tasks
    for task, rows in documents.items():
        for model in ("base", "model"):
            found = written.predictions[model][task]
            assert len(rows) == len(found.pred)
            if task != "stsb":
                right = [one["right"][model] for one in rows]
                assert right == (found.pred == found.label).tolist()
                assert [one["answers"][model] for one in rows] == list(found.answers)
    first = documents["sst2"][0]
    assert first["prompt"].endswith("The author's attitude is")
    assert first["answer"] == "positive"
    assert first["answers"]["model"] in ("positive", "negative")
    assert documents["openbookqa"][0]["options"] == ["grow", "wilt", "sing", "melt"]
    assert documents["openbookqa"][0]["answer"] == "B"
    rating = documents["stsb"][1]
    assert rating["answer"] == "3.5"
    assert rating["answers"]["model"] == f"{written.predictions['model']['stsb'].pred[1]:.2f}"
    assert rating["right"]["model"] is None


@pytest.mark.parametrize("form", ["bytes", "path"])
def test_images_become_thumbnails(tmp_path: Path, form: str) -> None:
    image = picture()
    if form == "path":
        (tmp_path / "teal.png").write_bytes(image["bytes"])
        image = {"bytes": None, "path": str(tmp_path / "teal.png")}
    run = tmp_path / "run.json"
    scored({"sst2": {"base": [True]}}, changes={"image": image}).write(run)
    (row,) = pq.read_table(tmp_path / "run_documents.parquet").to_pylist()
    with Image.open(io.BytesIO(row["image"])) as thumbnail:
        assert thumbnail.format == "JPEG"
        assert thumbnail.size == (256, 128)
    assert len(row["image"]) < 2000


def test_many_rows_take_little_room(tmp_path: Path) -> None:
    """Rows of some 60 characters each, and the same again for two models' answers."""
    right = {"sst2": {"base": [True, False] * 10_000, "adapter": [True] * 20_000}}
    write_run(tmp_path / "moelora_eval.json", right=right)
    assert (tmp_path / "moelora_eval_documents.parquet").stat().st_size < 400_000


@pytest.mark.parametrize("fails", ["write_documents", "_write_json"])
def test_a_failure_leaves_no_file_and_those_of_the_run_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    write_run(tmp_path / "before" / "moelora_eval.json")
    before = {path: path.read_bytes() for path in (tmp_path / "before").iterdir()}
    monkeypatch.setattr(report, fails, full)
    for folder in ("before", "new"):
        with pytest.raises(OSError, match="No space left"):
            write_run(tmp_path / folder / "moelora_eval.json", request={"limit": 1})
    assert {path: path.read_bytes() for path in (tmp_path / "before").iterdir()} == before
    assert list((tmp_path / "new").iterdir()) == []


def test_a_row_that_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="replace it"):
        write_run(tmp_path / "moelora_eval.json", changes={"image": {"bytes": b"?", "path": None}})
    assert list(tmp_path.iterdir()) == []


def test_documents_of_another_run_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "moelora_eval.json")
    file = tmp_path / "moelora_eval_documents.parquet"
    with pytest.raises(ConfigError, match=r"documents.parquet is not the file that was written"):
        read_documents(file, "0" * 64, {"sst2": 60, "rte": 40}, ["base", "adapter"])


def swollen(name: str, rows: int) -> pa.Table:
    """Documents that take little room in a file and much out of it."""
    large = "x" * 2**20
    columns: dict[str, list[Any]] = {
        "task": ["sst2"] * rows,
        "doc": list(range(rows)),
        "prompt": [large if name == "a long text" else "?"] * rows,
        "options": [[None] * 2000 if name == "many options" else []] * rows,
        "answer": ["A"] * rows,
        "category": [None] * rows,
        "image": [large.encode() if name == "a large image" else None] * rows,
        "answers": [{"base": large if name == "a long answer" else "A"}] * rows,
        "right": [{"base": True}] * rows,
    }
    return pa.table(columns, schema=_schema(["base"]))


@pytest.mark.parametrize(
    "name", ["a long text", "many options", "a large image", "a long answer", "more rows"]
)
def test_a_file_that_swells_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(in_parquet, "DOCUMENT_BYTES", 2**28)
    file, rows = tmp_path / "run_documents.parquet", 300
    pq.write_table(swollen(name, rows), file, compression="zstd")
    assert file.stat().st_size < 2**17
    monkeypatch.setattr(in_parquet, "_AT_ONCE", 8)
    told = rows if name != "more rows" else rows - 1
    before = pa.total_allocated_bytes()
    with pytest.raises(ConfigError, match=r"more than|other rows"):
        read_documents(file, sha256_of(file), {"sst2": told}, ["base"])
    assert pa.total_allocated_bytes() - before < 2**26


def test_what_a_batch_holds_is_counted_as_often_as_it_is_named() -> None:
    texts = pa.array(["ab", None, "ab", "cde"]).dictionary_encode()
    assert in_parquet._bytes_of(texts) == 7
    nested = pa.StructArray.from_arrays([texts], ["base"])
    assert in_parquet._bytes_of(nested) == 7
    assert in_parquet._bytes_of(pa.ListArray.from_arrays([0, 2, 4], texts)) == 7
