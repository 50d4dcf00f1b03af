"""Rows that were trained on and are scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from task_rows import ROWS, write_split
from tiny import tiny_llama, tiny_tokenizer

from moelora_plugin.checkpoint import save_adapter
from moelora_plugin.evaluation import EvaluationRequest, evaluate
from moelora_plugin.evaluation.harness import load_tasks
from moelora_plugin.evaluation.overlap import count_overlap, overlap_warnings
from moelora_plugin.training import load_recipe, train

TRAINED, NEW = ROWS["sst2"], [{"sentence": "a film like no other", "label": 1}]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A data folder with two of the four training rows of SST-2 among the three scored ones."""
    folder = tmp_path / "rows"
    write_split(folder, "sst2", "train", TRAINED)
    # White space at the ends is not shown.
    scored = [TRAINED[0], {**TRAINED[2], "sentence": f" {TRAINED[2]['sentence'].strip()}"}, *NEW]
    write_split(folder, "sst2", "validation", scored)
    for split in ("train", "validation"):
        write_split(folder, "rte", split, ROWS["rte"])
    return folder


@pytest.fixture
def make_adapter(adapter: PeftModel, tmp_path: Path) -> Any:
    """Saves an adapter with the manifest of a training run."""

    def make(*sources: tuple[str, str, int], limit: int | None = None) -> str:
        manifest = {
            "recipe": {"data": {"limit": limit}, "seed": 0},
            "data": [{"task": task, "split": split, "rows": n} for task, split, n in sources],
        }
        return str(save_adapter(adapter, tmp_path / "adapter", manifest=manifest, overwrite=True))

    return make


def _count(rows: Path, adapter: str, *tasks: str, **draw: Any) -> dict[str, int | None]:
    return dict(count_overlap(load_tasks(tasks, str(rows), **draw), {"model": adapter})["model"])


def test_scored_rows_that_were_trained_on_are_counted(rows: Path, make_adapter: Any) -> None:
    adapter = make_adapter(("sst2", "train", 4))
    assert _count(rows, adapter, "sst2", "rte") == {"sst2": 2, "rte": 0}


def test_a_row_is_the_same_under_every_protocol(rows: Path, make_adapter: Any) -> None:
    adapter = make_adapter(("sst2_gen", "train", 4))
    assert _count(rows, adapter, "sst2", "sst2_paper") == {"sst2": 2, "sst2_paper": 2}


def test_only_the_rows_that_are_drawn_count(rows: Path, make_adapter: Any) -> None:
    found = [_count(rows, make_adapter(("rte", "train", 1), limit=1), "rte")["rte"]]
    found += [_count(rows, make_adapter(("rte", "train", 4)), "rte", limit=3)["rte"]]
    assert found == [1, 3]


def test_options_are_part_of_a_row(tmp_path: Path, make_adapter: Any) -> None:
    first, second, *_ = ROWS["commonsenseqa"]
    changed = {**second, "choices": {**second["choices"], "text": ["a", "b", "c", "d", "e"]}}
    write_split(tmp_path, "commonsenseqa", "train", [first, second])
    write_split(tmp_path, "commonsenseqa", "validation", [first, changed])
    adapter = make_adapter(("commonsenseqa", "train", 2))
    assert _count(tmp_path, adapter, "commonsenseqa") == {"commonsenseqa": 1}


def test_images_are_part_of_a_row(tmp_path: Path, make_adapter: Any) -> None:
    first, second, *_ = ROWS["scienceqa_image"]
    write_split(tmp_path, "scienceqa_image", "train", [first, second])
    scored = [first, {**second, "image": first["image"]}]
    write_split(tmp_path, "scienceqa_image", "test", scored)
    adapter = make_adapter(("scienceqa_image", "train", 2))
    assert _count(tmp_path, adapter, "scienceqa_image") == {"scienceqa_image": 1}


def test_rows_held_out_while_training_were_not_trained_on(rows: Path, make_adapter: Any) -> None:
    assert _count(rows, make_adapter(("sst2", "validation", 3)), "sst2") == {"sst2": 0}


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (("sst2", "train", 5), "other rows than were trained on"),
        (("a_task_of_the_future", "train", 4), "unknown"),
    ],
)
def test_rows_that_are_others_are_unknown(
    source: tuple[str, str, int], why: str, rows: Path, make_adapter: Any
) -> None:
    assert _count(rows, make_adapter(source), "sst2") == {"sst2": None}, why


def test_rows_that_are_not_at_hand_are_unknown(rows: Path, make_adapter: Any) -> None:
    adapter = make_adapter(("sst2", "train", 4))
    (rows / "glue_sst2" / "train.parquet").unlink()
    assert _count(rows, adapter, "sst2", "rte") == {"sst2": None, "rte": 0}


def test_an_adapter_of_another_program_is_unknown(
    rows: Path, adapter: PeftModel, tmp_path: Path
) -> None:
    adapter.save_pretrained(tmp_path / "plain")
    assert _count(rows, str(tmp_path / "plain"), "sst2") == {"sst2": None}


def test_warnings_name_rows_and_what_is_unknown() -> None:
    overlap = {"a": {"sst2": 3, "rte": 0, "wnli": 1}, "b": {"sst2": 0, "rte": None, "wnli": 2}}
    assert overlap_warnings(overlap) == [
        "Rows scored that were trained on (how many): a on sst2 (3), wnli (1); b on wnli (2).",
        "Not known whether rows scored were trained on: b on rte.",
    ]
    assert overlap_warnings({"a": {"sst2": 0}}) == []


def test_a_run_records_what_its_adapter_was_trained_on(rows: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    recipe = tmp_path / "recipe.yaml"
    content = {
        "model": {"name": str(base)},
        "adapter": {"num_experts": 2, "top_k": 1, "r": 2, "target_modules": ["q_proj"]},
        "data": {"tasks": ["sst2"], "data_dir": str(rows)},
        "training": {"max_steps": 1, "use_cpu": True, "disable_tqdm": True},
        "output_dir": str(tmp_path / "run"),
    }
    recipe.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    train(load_recipe(recipe))
    report = evaluate(
        EvaluationRequest(
            tasks=("sst2",),
            adapters=(str(tmp_path / "run" / "adapter"),),
            data_dir=str(rows),
            device="cpu",
            output=tmp_path,
        )
    )
    assert report.path is not None
    written = json.loads(report.path.read_text(encoding="utf-8"))
    assert written["overlap"] == {"adapter": {"sst2": 2}}
