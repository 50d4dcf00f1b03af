from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

from moelora_plugin.errors import ConfigError
from moelora_plugin.training import Recipe, TrainResult, load_recipe, train
from moelora_plugin.training.callbacks import record_routing
from moelora_plugin.training.examples import AnswerCollator
from moelora_plugin.training.trainer import STAGING, MoeLoraTrainer

MakeRecipe = Callable[..., Recipe]


def losses(result: TrainResult) -> list[float]:
    return [entry["loss"] for entry in result.log_history if "loss" in entry]


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_file(result.adapter_dir / "adapter_model.safetensors")


class StopAt(TrainerCallback):
    """Crashes a run after a step, as a power cut would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("optimizer", ["rsgd", "grsgd", "radamw", "gradamw"])
def test_training_lowers_the_loss(make_recipe: MakeRecipe, optimizer: str) -> None:
    lr = 3e-3 if optimizer.endswith("adamw") else 1e-2
    result = train(make_recipe(optimizer={"name": optimizer, "lr": lr}, training={"max_steps": 20}))
    history = losses(result)
    assert len(history) == result.steps == 20
    assert sum(history[-5:]) < 0.9 * sum(history[:5])


def test_a_run_leaves_adapter_recipe_history_and_checkpoints(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(training={"eval_steps": 4})
    result = train(recipe)
    folder = result.output_dir
    assert sorted(path.name for path in folder.iterdir()) == [
        ".moelora.json",
        "adapter",
        "checkpoints",
        "log_history.json",
        "recipe.yaml",
    ]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "checkpoint-4",
        "checkpoint-8",
    ]
    assert load_recipe(folder / "recipe.yaml") == recipe
    assert json.loads((folder / "log_history.json").read_text()) == result.log_history
    manifest = json.loads((result.adapter_dir / "moelora.json").read_text())
    assert "output_dir" not in manifest["recipe"]
    assert "data_dir" not in manifest["recipe"]["data"]
    assert manifest["recipe"]["seed"] == recipe.seed
    assert [(source["split"], source["rows"]) for source in manifest["data"]] == [
        ("train", 48),
        ("validation", 12),
    ]
    assert manifest["eval_loss"] == result.eval_loss
    assert all(sum(layer["load"]) == pytest.approx(1) for layer in manifest["routing"].values())
    evaluated = [entry["step"] for entry in result.log_history if "eval_loss" in entry]
    assert evaluated == [4, 8, 8]  # the last one is the saved adapter's
    routed = [entry["step"] for entry in result.log_history if "routing_entropy" in entry]
    assert routed == evaluated
    console = Console(record=True, width=200)
    console.print(result.table())
    assert f"{result.trainable_parameters:,}" in console.export_text()


def test_seeded_runs_are_bitwise_equal(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    one = train(make_recipe(output_dir=str(tmp_path / "one")))
    torch.manual_seed(99)
    two = train(make_recipe(output_dir=str(tmp_path / "two")))
    other = train(make_recipe(output_dir=str(tmp_path / "other"), seed=1))
    assert losses(one) == losses(two) != losses(other)
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(two)[name]), name


def test_recording_the_routing_changes_nothing(make_recipe: MakeRecipe) -> None:
    class Record(TrainerCallback):
        def on_step_end(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            random_state = torch.get_rng_state()
            rows = Dataset.from_dict({"input_ids": [[5, 6]] * 3, "labels": [[5, 6]] * 3})
            layers = record_routing(model, rows, AnswerCollator(pad_token_id=2), batch_size=2)
            assert torch.equal(torch.get_rng_state(), random_state)
            assert model.training
            assert {layer["tokens"] for layer in layers.values()} == {6}

    train(make_recipe(training={"max_steps": 1}), callbacks=[Record()])


def test_resuming_gives_the_losses_of_the_uninterrupted_run(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    # Twelve steps per epoch, so the run is cut within its second epoch.
    training = {"max_steps": 18, "save_steps": 5, "eval_steps": 5}
    whole = train(make_recipe(output_dir=str(tmp_path / "whole"), training=training))
    recipe = make_recipe(output_dir=str(tmp_path / "cut"), training=training)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, callbacks=[StopAt(17)])
    resumed = train(recipe, resume="last")
    assert losses(resumed) == losses(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name


def test_a_resumed_run_asks_for_the_adapter_of_its_checkpoint(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make_recipe())
    monkeypatch.setattr("moelora_plugin.training.run.load_model", None)  # it is not come to
    with pytest.raises(ConfigError, match=r"^adapter.top_k is 1 in this run, and the checkpoint"):
        train(make_recipe(adapter={"top_k": 1}), resume="last")


def test_a_half_written_checkpoint_is_never_resumed_from(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    save_rng_state = MoeLoraTrainer._save_rng_state

    def crash_at_eight(self: MoeLoraTrainer, output_dir: str) -> None:
        if self.state.global_step == 8:
            raise KeyboardInterrupt
        save_rng_state(self, output_dir)

    monkeypatch.setattr(MoeLoraTrainer, "_save_rng_state", crash_at_eight)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    monkeypatch.undo()
    checkpoints = Path(recipe.output_dir) / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-4"]

    # A power cut runs no clean-up: the folder it leaves is not taken for a checkpoint either.
    (checkpoints / STAGING / "checkpoint-8").mkdir(parents=True)
    assert train(recipe, resume="last").steps == 8
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-8"]


def test_old_checkpoints_are_rotated_away(make_recipe: MakeRecipe) -> None:
    result = train(make_recipe(training={"save_steps": 2, "save_total_limit": 2}))
    names = sorted(path.name for path in (result.output_dir / "checkpoints").iterdir())
    assert names == ["checkpoint-6", "checkpoint-8"]


def test_both_groups_end_at_a_tenth_of_their_learning_rate(make_recipe: MakeRecipe) -> None:
    seen: list[list[float]] = []

    class Watch(TrainerCallback):
        def on_step_end(
            self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
        ) -> None:
            seen.append([group["lr"] for group in optimizer.param_groups])

    train(make_recipe(optimizer={"lr": 1e-3, "gate_lr": 1e-5}), callbacks=[Watch()])
    assert seen[3] == pytest.approx([0.55e-3, 0.55e-5])
    assert seen[-1] == pytest.approx([1e-4, 1e-6])


@pytest.mark.parametrize(
    ("sections", "last"),
    [
        ({"optimizer": {"lr": 1e-3, "final_lr_ratio": 1.0}}, 1e-3),
        ({"optimizer": {"lr": 1e-3, "final_lr_ratio": 0.0}}, 0.0),
        ({"optimizer": {"lr": 1e-3}, "training": {"lr_scheduler_type": "constant"}}, 1e-3),
    ],
)
def test_the_schedule_can_be_changed(
    make_recipe: MakeRecipe, sections: dict[str, Any], last: float
) -> None:
    class Watch(TrainerCallback):
        final = -1.0

        def on_step_end(
            self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
        ) -> None:
            self.final = optimizer.param_groups[0]["lr"]

    watch = Watch()
    train(make_recipe(**sections), callbacks=[watch])
    assert watch.final == pytest.approx(last)


def test_early_stopping_saves_the_best_checkpoint(make_recipe: MakeRecipe) -> None:
    # The rate is far too high, so the loss soon rises.
    result = train(
        make_recipe(
            optimizer={"lr": 3.0},
            training={"max_steps": 40, "eval_steps": 2, "save_steps": 2, "save_total_limit": 1},
            early_stopping={"patience": 2},
        )
    )
    history = [entry["eval_loss"] for entry in result.log_history if "eval_loss" in entry]
    assert result.steps < 40
    assert result.eval_loss == min(history) < history[-2]
    checkpoints = result.output_dir / "checkpoints"
    (kept,) = checkpoints.iterdir()
    state = json.loads((kept / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(kept)


def test_resuming_keeps_the_patience_that_was_used_up(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {
        "optimizer": {"lr": 3.0},
        "training": {"max_steps": 40, "eval_steps": 2, "save_steps": 2},
        "early_stopping": {"patience": 2},
    }
    whole = train(make_recipe(output_dir=str(tmp_path / "whole"), **sections))
    assert whole.steps < 40
    recipe = make_recipe(output_dir=str(tmp_path / "cut"), **sections)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, callbacks=[StopAt(whole.steps - 1)])
    resumed = train(recipe, resume="last")
    assert (resumed.steps, resumed.eval_loss) == (whole.steps, whole.eval_loss)


def test_similar_lengths_can_share_a_batch(make_recipe: MakeRecipe) -> None:
    result = train(make_recipe(training={"train_sampling_strategy": "group_by_length"}))
    assert result.steps == 8


def test_cut_prompts_are_reported(
    make_recipe: MakeRecipe, caplog: pytest.LogCaptureFixture
) -> None:
    result = train(make_recipe(data={"max_length": 20}))
    assert result.cut_rows == 48
    assert "48 prompts were longer than data.max_length=20" in caplog.text


def test_a_full_output_folder_is_refused_until_overwritten(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(training={"max_steps": 2, "save_steps": 1})
    train(recipe)
    with pytest.raises(Exception, match=r"already holds something.*output_dir.*--overwrite"):
        train(recipe)
    shorter = make_recipe(training={"max_steps": 1, "save_steps": 1})
    result = train(shorter, overwrite=True)
    assert [p.name for p in (result.output_dir / "checkpoints").iterdir()] == ["checkpoint-1"]
    assert yaml.safe_load((result.output_dir / "recipe.yaml").read_text()) == shorter.to_dict()
