from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moelora_plugin.errors import ConfigError
from moelora_plugin.training import load_recipe

MINIMAL = "model: {name: some/base}\ndata: {tasks: [sst2]}\n"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(MINIMAL)
    return path


def test_only_base_and_tasks_are_required(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.optimizer.name == "gradamw"
    assert recipe.output_dir == "runs/small"
    assert recipe.early_stopping is None


def test_an_override_is_yaml_and_wins_over_the_file(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        ["optimizer.lr=1e-4", "training.eval_strategy=no", "data.tasks={sst2: 2, qqp: 1}"],
        data_dir="rows",
        output_dir="out",
    )
    assert recipe.optimizer.lr == 1e-4
    assert recipe.training == {"eval_strategy": "no"}
    assert recipe.data.tasks == {"sst2": 2.0, "qqp": 1.0}
    assert (recipe.data.data_dir, recipe.output_dir) == ("rows", "out")


def test_extends_merges_sections_and_replaces_values(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        MINIMAL + "optimizer: {name: rsgd, lr: 1}\ntraining: {max_steps: 5}\n"
    )
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "child.yaml"
    path.write_text("extends: ../base.yaml\noptimizer: {lr: 2}\ndata: {tasks: {rte: 1}}\n")
    recipe = load_recipe(path)
    assert (recipe.optimizer.name, recipe.optimizer.lr) == ("rsgd", 2.0)
    assert recipe.data.tasks == {"rte": 1.0}
    assert recipe.training == {"max_steps": 5}


def test_a_section_without_keys_means_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text(MINIMAL + "training:\n")
    assert load_recipe(path).training == {}


def test_a_resolved_recipe_reads_back_as_itself(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        recipe_file, ["early_stopping.patience=3", "seed=7", "training.save_strategy=no"]
    )
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(recipe.to_dict()))
    assert load_recipe(again) == recipe


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optimiser.lr=1", "Unknown recipe key 'optimiser'; did you mean 'optimizer'"),
        ("optimizer.lrr=1", "did you mean 'optimizer.lr'"),
        ("optimizer.name=gradam", "Unknown optimizer.name 'gradam'; did you mean 'gradamw'"),
        ("optimizer.lr=fast", "optimizer.lr is 'fast', but a number is expected"),
        ("optimizer.lr=-1", "optimizer.lr is -1.0, but a number above 0 is expected"),
        ("optimizer.betas=[0.9]", "optimizer.betas is [0.9], but a list of 2 values is expected"),
        ("optimizer.final_lr_ratio=2", "a number from 0 to 1 is expected"),
        ("data.max_length=true", "data.max_length is True, but a whole number is expected"),
        ("data.limit=0", "data.limit is 0, but a number above 0 or null is expected"),
        ("data.tasks=sst2", "data.tasks is 'sst2', but a list or a mapping is expected"),
        ("data.tasks=[]", "data.tasks is [], but at least one task is expected"),
        ("data.tasks={sst2: 0}", "data.tasks.sst2 is 0.0, but a weight above 0 is expected"),
        ("early_stopping=5", "early_stopping is 5, but a mapping is expected"),
        ("early_stopping.patience=0", "early_stopping.patience is 0, but a number above 0"),
        ("model.name.x=1", "name is 'some/base', but a mapping is expected"),
        ("seed", "The override 'seed' is not key=value"),
        ("seed=[1", "The value of the override 'seed=[1' is no YAML"),
    ],
)
def test_a_bad_override_is_one_sentence(recipe_file: Path, override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(recipe_file, [override])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("data: {tasks: [sst2]}", "The recipe has no model; set model."),
        ("model: {}\ndata: {tasks: [sst2]}", "The recipe has no model.name; set model.name."),
        ("model: [", "is not valid YAML"),
        ("- model", "holds list, but a mapping is expected"),
        ("extends: gone.yaml", "gone.yaml that"),
        ("extends: 5", "extends is 5"),
        ("extends: bad.yaml", "extends itself"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        load_recipe(path)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_reading_a_recipe_loads_no_torch(recipe_file: Path) -> None:
    code = (
        "import sys; from moelora_plugin.training import load_recipe; "
        f"load_recipe({str(recipe_file)!r}); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
