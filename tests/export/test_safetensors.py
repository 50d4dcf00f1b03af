"""An adapter as a folder for others."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock, call

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from scored_runs import scored
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from moelora_plugin.errors import (
    AdapterError,
    ConfigError,
    ExportError,
    MissingDependencyError,
    MoeLoraError,
)
from moelora_plugin.export import export_adapter
from moelora_plugin.files import sha256_of

from .conftest import SaveAdapter, make_adapter

IDS = torch.tensor([[0, 40, 50, 60, 70]])
FILES = [
    ".moelora.json",
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "moelora.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def eval_file(path: Path, weights_sha256: str | None) -> Path:
    """A moelora_eval.json of an adapter with such weights, beside its base."""
    right = {
        "sst2": {"base": [True, False] * 100, "a": [True] * 190 + [False] * 10},
        "mrpc": {"base": [True, False] * 20, "a": [True] * 40},
    }
    report = scored(right, experts=("a",))
    if weights_sha256 is not None:
        report.models["a"] = {"sha256": {"adapter_model.safetensors": weights_sha256}}
    report.write(path)
    return path


def test_the_exported_adapter_is_the_saved_one_bitwise(
    base: Path, save: SaveAdapter, tmp_path: Path
) -> None:
    model = make_adapter(base)
    result = export_adapter(save(model), tmp_path / "shared")
    assert list(result.files) == names(tmp_path / "shared") == FILES
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "shared").eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        with loaded.disable_adapter():
            assert not torch.equal(loaded(IDS).logits, model(IDS).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "shared")
    assert (
        tokenizer("The film").input_ids == AutoTokenizer.from_pretrained(base)("The film").input_ids
    )


def test_what_training_left_beside_the_adapter_stays_behind(
    save: SaveAdapter, tmp_path: Path
) -> None:
    adapter = save()
    for name in (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "README.md",
    ):
        (adapter / name).write_text("left over")
    (adapter / "checkpoint-4").mkdir()
    export_adapter(adapter, tmp_path / "shared")
    assert names(tmp_path / "shared") == FILES
    assert "left over" not in (tmp_path / "shared" / "README.md").read_text()


def test_the_card(base: Path, save: SaveAdapter, tmp_path: Path) -> None:
    adapter = save()
    digest = sha256_of(adapter / "adapter_model.safetensors")
    scores = eval_file(tmp_path / "moelora_eval.json", digest)
    export_adapter(adapter, tmp_path / "shared", eval_file=scores)
    text = (tmp_path / "shared" / "README.md").read_text()
    assert str(tmp_path) not in text
    assert str(base.parent) not in text
    card = ModelCard(text)
    assert card.data.library_name == "peft"
    assert card.data.base_model is None  # a folder has no page on the hub
    assert "moelora" in card.data.tags
    for line in (
        f"| Base | `{base.name}` |",
        "| Experts | 4 per module, top 2, rank 2 each, alpha 16 |",
        "| Target modules | `down_proj`, `q_proj` |",
        "| Trained on | `sst2` |",
        "| Optimizer | gradamw, lr 0.0001, gate lr 3e-08 |",
        "| Steps | 60 |",
        "| Trainable parameters | 12,345 |",
        "| task | rows | metric | protocol | base | a | a - base [95 %] |",
    ):
        assert f"\n{line}\n" in text
    assert "AutoPeftModelForCausalLM.from_pretrained" in text
    lines = [line for line in text.splitlines() if line.startswith(("| sst2", "| mrpc"))]
    # The score of a task with a single metric would only repeat it.
    assert [line.split(" | ")[2] for line in lines] == ["acc", "acc", "f1", "score"]
    assert lines[0].startswith("| sst2 | 200 | acc | loglikelihood | 50.00 ± ")
    assert " | 95.00 ± 1." in lines[0]
    assert "| +45.00 [+" in lines[0]
    assert "measured with moelora" in text


def test_the_card_links_a_base_on_the_hub(save: SaveAdapter, tmp_path: Path) -> None:
    export_adapter(save(), tmp_path / "shared", base="org/model")
    card = ModelCard.load(tmp_path / "shared" / "README.md")
    assert card.data.base_model == "org/model"
    assert "## Scores" not in card.text
    config = json.loads((tmp_path / "shared" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/model"


def test_the_card_names_kinds_of_modules_where_there_are_many(
    save: SaveAdapter, tmp_path: Path
) -> None:
    export_adapter(save(target_modules="all-linear"), tmp_path / "shared")
    text = (tmp_path / "shared" / "README.md").read_text()
    assert "`q_proj`, `up_proj`, `v_proj` (14 modules) |\n" in text
    assert "layers.0" not in text


def test_an_adapter_without_a_manifest_has_a_card_too(base: Path, tmp_path: Path) -> None:
    make_adapter(base).save_pretrained(tmp_path / "adapter")
    export_adapter(tmp_path / "adapter", tmp_path / "shared")
    assert "Trained on" not in (tmp_path / "shared" / "README.md").read_text()


@pytest.mark.parametrize(
    ("digest", "said"), [("0" * 64, "of other weights"), (None, "of no saved adapter")]
)
def test_scores_of_something_else_are_refused(
    save: SaveAdapter, tmp_path: Path, digest: str | None, said: str
) -> None:
    path = eval_file(tmp_path / "scores.json", digest)
    with pytest.raises(ConfigError, match=f"^--eval-file .*scores.json .*{said}; make one with"):
        export_adapter(save(), tmp_path / "shared", eval_file=path)
    assert not (tmp_path / "shared").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        (b"\xff\x00", "is not a file that `moelora eval` has written"),
        (b'{"format_version": 1}', "has format version 1"),
    ],
)
def test_files_that_hold_no_scores_are_refused(
    save: SaveAdapter, tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = tmp_path / "scores.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^--eval-file .*scores.json {said}"):
        export_adapter(save(), tmp_path / "shared", eval_file=path)
    assert not (tmp_path / "shared").exists()


def test_a_folder_that_holds_something_is_refused_until_overwritten(
    save: SaveAdapter, tmp_path: Path
) -> None:
    adapter, out = save(), tmp_path / "shared"
    out.mkdir()
    export_adapter(adapter, out)  # an empty folder is free
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"already holds something.*--out.*--overwrite"):
        export_adapter(adapter, out)
    export_adapter(adapter, out, overwrite=True)
    assert names(out) == sorted([*FILES, "notes.txt"])
    assert (out / "notes.txt").read_text() == "mine"
    assert names(tmp_path) == ["adapter", "shared"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_way_stays(save: SaveAdapter, tmp_path: Path, overwrite: bool) -> None:
    adapter, out = save(), tmp_path / "shared"
    out.write_text("a file")
    with pytest.raises(ConfigError, match="is a file, which not even --overwrite replaces"):
        export_adapter(adapter, out, overwrite=overwrite)
    assert out.read_text() == "a file"
    assert names(tmp_path) == ["adapter", "shared"]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"to": "gguf"}, ConfigError, r"--to gguf must be one of safetensors, merged"),
        (
            {"to": "merged", "strategy": "mean"},
            ConfigError,
            r"--strategy mean must be one of exact, mean-gate",
        ),
        ({"strategy": "mean-gate"}, ConfigError, r"pass --to merged with it"),
        ({"dtype": "float8"}, ConfigError, r"dtype='float8' must be one of auto"),
    ],
)
def test_unknown_options_are_refused(
    save: SaveAdapter,
    tmp_path: Path,
    options: dict[str, str],
    error: type[MoeLoraError],
    said: str,
) -> None:
    with pytest.raises(error, match=said):
        export_adapter(save(), tmp_path / "shared", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "shared").exists()


@pytest.mark.parametrize("to", ["safetensors", "merged"])
def test_damaged_and_other_adapters_are_refused(
    save: SaveAdapter, tmp_path: Path, base: Path, to: str
) -> None:
    adapter = save(num_experts=1, top_k=1)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(AdapterError, match="truncated or damaged"):
        export_adapter(adapter, tmp_path / "shared", to=to)
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    lora.peft_config["default"].base_model_name_or_path = str(base)
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ExportError, match="is a LORA adapter"):
        export_adapter(tmp_path / "lora", tmp_path / "shared", to=to)
    assert names(tmp_path) == ["adapter", "lora"]


def test_pushing(save: SaveAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = Mock()
    monkeypatch.setattr("moelora_plugin.export.run.HfApi", Mock(return_value=api))
    out = tmp_path / "shared"
    result = export_adapter(save(), out, push_to_hub="me/sst2-moelora")
    assert api.mock_calls == [
        call.create_repo("me/sst2-moelora", exist_ok=True),
        call.upload_folder(
            repo_id="me/sst2-moelora", folder_path=str(out), ignore_patterns=[".moelora.json"]
        ),
    ]
    assert result.url == "https://huggingface.co/me/sst2-moelora"
    console = Console(width=200, record=True)
    console.print(result.table())
    assert result.url in console.export_text()


def test_a_push_that_fails_says_that_the_folder_is_there(
    save: SaveAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = Mock(create_repo=Mock(side_effect=ConnectionError("401 Unauthorized")))
    monkeypatch.setattr("moelora_plugin.export.run.HfApi", Mock(return_value=api))
    said = (
        r"shared is written, but .*'me/it' failed \(401 Unauthorized\); log in with `hf auth login`"
    )
    with pytest.raises(MissingDependencyError, match=said):
        export_adapter(save(), tmp_path / "shared", push_to_hub="me/it")
    assert names(tmp_path / "shared") == FILES


def test_without_a_wish_to_push_the_hub_is_not_asked(
    save: SaveAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moelora_plugin.export.run.HfApi", Mock(side_effect=AssertionError))
    assert export_adapter(save(), tmp_path / "shared").url is None


def test_a_link_to_a_file_of_this_machine_is_not_shared(save: SaveAdapter, tmp_path: Path) -> None:
    adapter, secret = save(), tmp_path / "secret.json"
    secret.write_text("{}")
    (adapter / "tokenizer_config.json").unlink()
    (adapter / "tokenizer_config.json").symlink_to(secret)
    with pytest.raises(ExportError, match="a link out of the adapter's folder"):
        export_adapter(adapter, tmp_path / "shared")
    assert not (tmp_path / "shared").exists()


def test_links_into_the_hubs_cache_are_followed(save: SaveAdapter, tmp_path: Path) -> None:
    adapter, repo = save(), tmp_path / "models--me--adapter"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(adapter.iterdir())):
        (repo / "blobs" / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    export_adapter(snapshot, tmp_path / "shared")
    assert sha256_of(tmp_path / "shared" / "adapter_model.safetensors") == sha256_of(
        adapter / "adapter_model.safetensors"
    )
