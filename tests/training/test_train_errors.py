"""Whatever is wrong with a run is one sentence, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

from moelora_plugin import load_adapter
from moelora_plugin.errors import ConfigError, DataError, MissingDependencyError, MoeLoraError
from moelora_plugin.manifest import read_manifest
from moelora_plugin.training import Recipe, run, train

MakeRecipe = Callable[..., Recipe]


@pytest.mark.parametrize(
    ("sections", "error", "sentence"),
    [
        ({"training": {"max_stps": 1}}, ConfigError, "did you mean 'training.max_steps'"),
        ({"training": {"learning_rate": 1.0}}, ConfigError, "is set by optimizer.lr"),
        ({"training": {"push_to_hub": True}}, ConfigError, "moelora export --push-to-hub"),
        ({"training": {"eval_strategy": "often"}}, ConfigError, "often"),
        (
            {"early_stopping": {"patience": 1}},
            ConfigError,
            "training.save_steps is 4, but training",
        ),
        ({"adapter": {"preset": "gr_moe_lra"}}, ConfigError, "did you mean 'gr_moe_lora'"),
        ({"adapter": {"preset": 3}}, ConfigError, "adapter.preset is 3"),
        ({"adapter": {"num_expert": 3}}, ConfigError, "num_experts"),
        ({"adapter": {"top_k": 9}}, ConfigError, "top_k"),
        ({"adapter": {"target_modules": ["nowhere"]}}, ConfigError, "q_proj"),
        ({"data": {"tasks": ["ssst2"]}}, ConfigError, "did you mean 'sst2'"),
        ({"data": {"tasks": ["rte"]}}, DataError, "rte"),
        ({"data": {"max_length": 1}}, DataError, "raise data.max_length"),
        ({"model": {"name": "/nowhere/at/all"}}, MissingDependencyError, "model.name"),
        ({"model": {"attn_implementation": "sdppa"}}, ConfigError, "attn_implementation"),
    ],
)
def test_a_bad_recipe(
    make_recipe: MakeRecipe, sections: dict[str, Any], error: type[MoeLoraError], sentence: str
) -> None:
    recipe = make_recipe(**sections)
    with pytest.raises(error) as raised:
        train(recipe)
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not Path(recipe.output_dir).exists()


def test_a_base_without_a_tokenizer(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "mute")
    with pytest.raises(ConfigError, match="holds a model but no tokenizer"):
        train(make_recipe(model={"name": str(tmp_path / "mute")}))


def test_a_folder_without_a_model(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"^Cannot load a model from .*model\.name"):
        train(make_recipe(model={"name": str(tmp_path / "empty")}))


def test_a_tokenizer_without_eos(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    tiny_llama().save_pretrained(tmp_path / "endless")
    with pytest.raises(ConfigError, match="has no eos_token"):
        train(make_recipe(model={"name": str(tmp_path / "endless")}))


def test_a_diverging_run_stops(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(optimizer={"name": "rsgd", "lr": 1e30}, training={"save_strategy": "no"})
    with pytest.raises(ConfigError, match=r"lower optimizer\.lr"):
        train(recipe)
    assert not Path(recipe.output_dir).exists()


@pytest.mark.parametrize("resume", ["last", "checkpoint-3"])
def test_nothing_to_resume_from(make_recipe: MakeRecipe, resume: str) -> None:
    with pytest.raises(ConfigError, match="--resume"):
        train(make_recipe(), resume=resume)


@pytest.mark.parametrize("what", ["eval_loss", "routing"])
def test_what_is_measured_at_the_end_costs_no_adapter(
    what: str,
    make_recipe: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = make_recipe(training={"eval_strategy": "epoch", "num_train_epochs": 1})
    evaluate = run.MoeLoraTrainer.evaluate
    calls = []

    def broken(*args: Any, **keys: Any) -> Any:
        calls.append(args)
        if what == "routing" or len(calls) > 1:  # the first evaluation is the epoch's
            raise torch.OutOfMemoryError("Tried to allocate 2 GiB")
        return evaluate(*args, **keys)

    if what == "routing":
        monkeypatch.setattr(run, "record_routing", broken)
    else:
        monkeypatch.setattr(run.MoeLoraTrainer, "evaluate", broken)
    result = train(recipe)
    assert f"saved, but {what} could not be measured (Tried to allocate 2 GiB)" in caplog.text
    load_adapter(result.adapter_dir, device="cpu")
    manifest = read_manifest(result.adapter_dir)
    assert manifest.get(what) is None
    assert manifest["steps"] == result.steps
    assert (Path(recipe.output_dir) / "recipe.yaml").is_file()
    assert (Path(recipe.output_dir) / "log_history.json").is_file()
