"""Training on images, from a recipe to scores."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from task_rows import write_split
from tiny_vision import picture, save_tiny_vision, tiny_vision
from transformers import TrainerCallback
from typer.testing import CliRunner

from moelora_cli.main import app
from moelora_eval_tasks.catalog import TASKS
from moelora_eval_tasks.loading import load_split
from moelora_eval_tasks.prompts import render
from moelora_plugin.checkpoint import load_adapter
from moelora_plugin.errors import ConfigError, DataError, ExportError, ReachWarning
from moelora_plugin.evaluation import evaluate_model
from moelora_plugin.export import export_adapter
from moelora_plugin.search.run import guilomo
from moelora_plugin.training import Recipe, TrainResult, train
from moelora_plugin.training.base import load_processor
from moelora_plugin.training.clustering import cluster
from moelora_plugin.training.data import collator_for, load_data
from moelora_plugin.training.recipe import DataSection, ModelSection
from moelora_plugin.training.vision import vision_examples

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def vision_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a tiny vision model, by architecture."""
    folder = tmp_path_factory.mktemp("vision")

    def base(name: str) -> str:
        if not (folder / name).exists():
            save_tiny_vision(name, folder / name)
        return str(folder / name)

    return base


@pytest.fixture(scope="session")
def pictures_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures whose colour is the answer, and texts, in the layout of a data folder."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = random.Random(0)
    for split, count in (("train", 48), ("validation", 12), ("test", 24)):
        rows = []
        for _ in range(count):
            answer = generator.randrange(2)
            rows.append(
                {
                    "question": "Which colour?",
                    "choices": ["red", "blue"],
                    "answer": answer,
                    "hint": "",
                    "image": stored(("red", "blue")[answer], generator.randrange(18, 30)),
                }
            )
        write_split(folder, "scienceqa_image", split, rows)
        texts = [{**row, "image": None} for row in rows[:8]]
        write_split(folder, "scienceqa", split, texts)
        stars = [{"sentence": f"film {n}", "label": n % 2} for n in range(8)]
        write_split(folder, "sst2", split, stars)
    return folder


def stored(colour: str, width: int) -> dict[str, Any]:
    file = BytesIO()
    picture(colour, width=width).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture
def make_vision_recipe(
    make_recipe: MakeRecipe, vision_base: Callable[[str], str], pictures_dir: Path
) -> MakeRecipe:
    """Like `make_recipe`, with a vision model and pictures."""

    def make(name: str = "llava", **sections: Any) -> Recipe:
        values: dict[str, Any] = {
            "model": {"name": vision_base(name)},
            "adapter": {"target_modules": "all-linear", "lora_dropout": 0.0},
            "optimizer": {"lr": 1e-2},
            "data": {
                "tasks": ["scienceqa_image"],
                "data_dir": str(pictures_dir),
                "max_length": 512,
            },
        }
        for key, value in sections.items():
            below = values.get(key)
            values[key] = {**below, **value} if isinstance(below, dict) else value
        return make_recipe(**values)

    return make


def losses(result: TrainResult) -> list[float]:
    return [entry["loss"] for entry in result.log_history if "loss" in entry]


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_file(result.adapter_dir / "adapter_model.safetensors")


class Score(TrainerCallback):
    """Scores the model in memory when training ends."""

    def __init__(self, processor: Any, data_dir: Path) -> None:
        self.processor, self.data_dir = processor, data_dir

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.report = score(model, self.processor, self.data_dir)


def score(model: Any, processor: Any, data_dir: Path) -> Any:
    return evaluate_model(
        model, processor, ["scienceqa_image"], data_dir=str(data_dir), batch_size=4
    )


@pytest.fixture
def adapter(make_vision_recipe: MakeRecipe) -> Path:
    """A folder as training leaves it."""
    return train(make_vision_recipe(training={"max_steps": 1})).adapter_dir


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("llava", "gradamw"),
        pytest.param("qwen2_5_vl", "gradamw", marks=pytest.mark.slow),
        pytest.param("idefics3", "radamw", marks=pytest.mark.slow),
    ],
)
def test_a_model_learns_to_tell_pictures_apart(
    make_vision_recipe: MakeRecipe, pictures_dir: Path, name: str, optimizer: str
) -> None:
    recipe = make_vision_recipe(
        name, optimizer={"name": optimizer}, training={"max_steps": 30, "eval_steps": 15}
    )
    in_memory = Score(load_processor(recipe.model), pictures_dir)
    result = train(recipe, callbacks=[in_memory])
    history = losses(result)
    assert sum(history[-5:]) < 0.2 * sum(history[:5])
    from_disk = score(*load_adapter(result.adapter_dir), pictures_dir)
    assert from_disk.tasks["scienceqa_image"].metrics["model"]["acc"].value > 0.9  # chance: 0.5
    assert from_disk.tasks == in_memory.report.tasks


def test_pictures_and_texts_in_one_mixture(make_vision_recipe: MakeRecipe) -> None:
    tasks = {"scienceqa_image": 2.0, "scienceqa_all": 1.0, "sst2": 1.0}
    result = train(make_vision_recipe(data={"tasks": tasks}, training={"max_steps": 16}))
    history = losses(result)
    assert result.rows > 48 + 8 + 48 + 8  # every row is drawn, some again
    assert sum(history[-4:]) < 0.5 * sum(history[:4])


def test_a_vision_model_trains_on_text_alone(make_vision_recipe: MakeRecipe) -> None:
    recipe = make_vision_recipe(data={"tasks": ["sst2"], "max_length": 20})
    # Nothing shows the tower an image: its adapted linears are named.
    with pytest.warns(ReachWarning, match=r"did not reach \d+ adapted linears.*vision_tower"):
        history = losses(result := train(recipe))
    assert result.cut_rows == 8
    assert history[-1] < history[0]


def test_the_run_keeps_the_processor_and_the_routing_of_the_tower(
    make_vision_recipe: MakeRecipe,
) -> None:
    result = train(make_vision_recipe(training={"max_steps": 2}))
    manifest = json.loads((result.adapter_dir / "moelora.json").read_text())
    assert manifest["image_processor"]["crop_size"] == {"height": 16, "width": 16}
    processor = load_adapter(result.adapter_dir)[1]
    assert json.loads(processor.image_processor.to_json_string()) == manifest["image_processor"]
    tower = [layer for name, layer in manifest["routing"].items() if "vision_tower" in name]
    # 48 pictures of 16 patches and a class token each: no text mask is laid over them.
    assert {layer["tokens"] for layer in tower} == {48 * 17}
    assert all(sum(layer["load"]) == pytest.approx(1) for layer in tower)


def test_resuming_gives_the_losses_of_the_uninterrupted_run(
    make_vision_recipe: MakeRecipe, tmp_path: Path
) -> None:
    class Crash(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 6:
                raise KeyboardInterrupt

    sections: dict[str, Any] = {
        "data": {"tasks": ["scienceqa_image", "sst2"]},
        "training": {"max_steps": 8, "save_steps": 4},
        # Without dropout a run would draw nothing and resume whatever the random state.
        "adapter": {"lora_dropout": 0.1},
    }
    whole = train(make_vision_recipe(output_dir=str(tmp_path / "whole"), **sections))
    recipe = make_vision_recipe(output_dir=str(tmp_path / "cut"), **sections)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, callbacks=[Crash()])
    resumed = train(recipe, resume="last")
    assert losses(resumed) == losses(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name


# transformers 5.23 has a second name for it, which earlier versions do not know.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3"])
def test_gradient_checkpointing_changes_nothing(
    make_vision_recipe: MakeRecipe, tmp_path: Path, name: str
) -> None:
    plain, checkpointed = (
        train(
            make_vision_recipe(
                name,
                training={"max_steps": 2, "gradient_checkpointing": flag},
                output_dir=str(tmp_path / str(flag)),
            )
        )
        for flag in (False, True)
    )
    for key, tensor in weights(plain).items():
        assert torch.equal(tensor, weights(checkpointed)[key]), key


def test_the_command_trains_on_pictures(make_vision_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_vision_recipe(training={"max_steps": 1})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    result = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 0, result.output
    assert (Path(recipe.output_dir) / "adapter" / "processor_config.json").exists()


def test_a_recipe_is_told_how_long_its_longest_picture_is(
    make_vision_recipe: MakeRecipe,
) -> None:
    with pytest.raises(DataError, match="which are never cut") as raised:
        train(make_vision_recipe("qwen2_5_vl", data={"max_length": 30}))
    sentence = str(raised.value)
    assert "of scienceqa_image (train) has" in sentence
    longest = int(sentence.rpartition(" ")[2].rstrip("."))
    train(make_vision_recipe("qwen2_5_vl", data={"max_length": longest}, training={"max_steps": 1}))
    with pytest.raises(DataError, match=f"raise data.max_length to {longest}"):
        train(make_vision_recipe("qwen2_5_vl", data={"max_length": longest - 1}), overwrite=True)


def test_a_language_model_is_shown_no_pictures(make_vision_recipe: MakeRecipe, base: Path) -> None:
    recipe = make_vision_recipe(model={"name": str(base)}, data={"tasks": ["sst2", "vision"]})
    with pytest.raises(ConfigError, match=r"scienceqa_image, vmcbench, .*model\.name"):
        train(recipe)
    assert not Path(recipe.output_dir).exists()


def test_pictures_have_no_clusters(make_vision_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_vision_recipe(data={"clusters": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"scienceqa_image, whose images .* data\.clusters"):
        train(recipe)
    with pytest.raises(ConfigError, match=r"scienceqa_image, whose images .* text alone"):
        cluster(make_vision_recipe(), tmp_path / "clusters")


def test_the_search_takes_pictures(make_vision_recipe: MakeRecipe, tmp_path: Path) -> None:
    adapter = {"target_modules": ["q_proj", "v_proj"]}
    recipe = make_vision_recipe(adapter=adapter)
    guilomo(recipe, tmp_path / "allocation.json", steps=1, lr=1e-3, selection_lr=1e-2)
    found = json.loads((tmp_path / "allocation.json").read_text())
    assert any("vision_tower" in name for name in found)


def test_vmcbench_is_watched_on_the_rows_it_leaves_out(
    vision_base: Callable[[str], str], tmp_path: Path
) -> None:
    rows = [
        {
            "question": f"Number {number}?",
            **{letter: f"{letter} {number}" for letter in "ABCD"},
            "answer": "A",
            "category": "VQAv2",
            "image": stored("red", 16),
        }
        for number in range(903)
    ]
    write_split(tmp_path, "vmcbench", "dev", rows)
    processor = load_processor(ModelSection(name=vision_base("llava")))
    section = DataSection(tasks=["vmcbench_paper"], data_dir=str(tmp_path), max_length=512)
    data = load_data(section, processor, seed=0, validation=True)
    assert [(source.split, source.rows) for source in data.sources] == [("train", 900), ("dev", 3)]


def test_a_shared_adapter_brings_its_processor(adapter: Path, tmp_path: Path) -> None:
    export_adapter(adapter, tmp_path / "shared")
    processor = load_adapter(tmp_path / "shared")[1]
    assert (tmp_path / "shared" / "processor_config.json").exists()
    assert processor.to_dict() == load_adapter(adapter)[1].to_dict()


def test_gates_of_images_are_not_averaged_over_text(
    adapter: Path, tmp_path: Path, pictures_dir: Path
) -> None:
    with pytest.raises(ExportError, match=r"^mean-gate averages the gates over text, .*--to"):
        export_adapter(
            adapter,
            tmp_path / "merged",
            to="merged",
            strategy="mean-gate",
            calibration_tasks=["sst2"],
            data_dir=str(pictures_dir),
        )
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3"])
@pytest.mark.parametrize("task", ["scienceqa_image", "scienceqa_image_gen"])
def test_what_is_trained_is_what_is_scored(pictures_dir: Path, name: str, task: str) -> None:
    """The tokens that the model reads before its answer, those of the image with them."""
    model, processor = tiny_vision(name)
    scored: list[list[int]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] > 1:  # no token that was just written
            scored.append(kwargs["input_ids"][0].tolist())

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    evaluate_model(model, processor, [task], data_dir=str(pictures_dir), batch_size=1)
    handle.remove()
    build, collate = vision_examples(processor, 512), collator_for(processor)
    trained = []
    for row in load_split(TASKS[task], "test", str(pictures_dir)):
        batch = collate([build(render(TASKS[task], row), row["image"])])
        context = int((batch["labels"][0] != -100).int().argmax())
        trained.append(batch["input_ids"][0, :context].tolist())
    assert sorted(scored) == sorted(trained)
