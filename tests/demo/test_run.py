"""The demo from a base to a table, on a base small enough for two steps in a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from task_rows import write_data
from tiny import tiny_llama, tiny_tokenizer

from moelora_plugin.analysis import inspect_adapter
from moelora_plugin.demo import DemoResult, run_demo
from moelora_plugin.errors import ConfigError, DataError

FILES = [
    "adapter/README.md",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "adapter/moelora.json",
    "expert_load.png",
    "loss.png",
    "moelora_eval.json",
    "moelora_eval_documents.parquet",
    "run/adapter/adapter_model.safetensors",
    "run/log_history.json",
    "run/recipe.yaml",
]


@pytest.fixture(scope="module", autouse=True)
def _no_hub(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A tiny base in place of SmolLM2, and no hub."""
    base = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moelora_plugin.demo.run.hub_reachable", lambda: False)
        patch.setattr("moelora_plugin.demo.run.base_model", lambda from_hub: str(base))
        yield


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return run_demo(tmp_path_factory.mktemp("demo") / "out", steps=2)


def shown(result: DemoResult) -> str:
    console = Console(width=300, record=True)
    console.print(result.table())
    return console.export_text()


def test_everything_is_written(demo: DemoResult) -> None:
    for name in FILES:
        assert (demo.out / name).stat().st_size > 0, name
    for picture in demo.pictures:
        with Image.open(picture) as image:
            assert image.format == "PNG"
    assert len(json.loads((demo.out / "run" / "log_history.json").read_text())) >= 2


def test_the_adapter_is_the_papers_mixture_with_gradamw(demo: DemoResult) -> None:
    summary = inspect_adapter(demo.exported)
    config = summary.config
    assert (config.num_experts, config.top_k, config.r) == (20, 10, 4)
    assert config.gate_rescale == "sqrt"
    assert set(summary.modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert summary.manifest["recipe"]["optimizer"]["name"] == "gradamw"
    assert summary.manifest["recipe"]["model"]["dtype"] == "float32"
    assert summary.manifest["steps"] == 2


def test_base_and_adapter_are_scored_on_the_same_rows(demo: DemoResult) -> None:
    content = json.loads((demo.out / "moelora_eval.json").read_text())
    assert content["tasks"]["sst2"]["n"] == 200
    assert list(content["tasks"]["sst2"]["metrics"]) == ["base", "adapter"]
    card = (demo.exported / "README.md").read_text()
    assert "| sst2 | 200 | acc |" in card


def test_the_table_has_every_row(demo: DemoResult) -> None:
    text = shown(demo)
    measured = demo.evaluation.tasks["sst2"]
    low, high = measured.differences["adapter"].interval
    base, adapter = (100 * measured.metrics[name]["acc"].value for name in ("base", "adapter"))
    for row in (
        ("Data", "shipped sample"),
        ("Accuracy, base", f"{base:.1f} % of 200"),
        ("Accuracy, adapter", f"{adapter:.1f} %"),
        ("Difference", f"95 % interval {100 * low:+.1f} to {100 * high:+.1f}"),
        ("Time", f"{demo.seconds:.0f} s in all"),
        ("Trainable parameters", f"{demo.training.trainable_parameters:,}"),
        ("Adapter to share", str(demo.out / "adapter")),
        ("Scores", str(demo.out / "moelora_eval.json")),
        ("Picture", str(demo.out / "loss.png")),
        ("Picture", str(demo.out / "expert_load.png")),
    ):
        assert any(all(cell in line for cell in row) for line in text.splitlines()), row


def test_a_second_run_is_refused_until_overwritten(demo: DemoResult) -> None:
    files = {path: path.stat().st_mtime_ns for path in demo.out.rglob("*")}
    with pytest.raises(ConfigError, match=r"already holds something.*--out.*--overwrite"):
        run_demo(demo.out, steps=1)
    assert {path: path.stat().st_mtime_ns for path in demo.out.rglob("*")} == files
    again = run_demo(demo.out, steps=1, overwrite=True)
    assert again.training.steps == 1
    assert {path.relative_to(demo.out) for path in demo.out.rglob("*")} == {
        path.relative_to(demo.out) for path in files
    }


def test_a_data_folder_is_used(tmp_path: Path) -> None:
    data_dir = str(write_data(tmp_path / "rows", ["sst2"]))
    result = run_demo(tmp_path / "out", data_dir=data_dir, steps=1, seed=3)
    assert f"SST-2 from {data_dir}" in shown(result)
    assert result.evaluation.tasks["sst2"].n == 4
    assert result.training.rows == 4
    assert not (tmp_path / "out" / "data").exists()
    manifest = inspect_adapter(result.exported).manifest
    assert manifest["recipe"]["seed"] == 3


def test_what_cannot_work_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="steps is 0, expected at least 1; change --steps"):
        run_demo(tmp_path / "out", steps=0)
    with pytest.raises(DataError, match="does not exist"):
        run_demo(tmp_path / "out", data_dir=str(tmp_path / "nowhere"), steps=1)
    assert list(tmp_path.iterdir()) == []
