"""A folder to work in, with an adapter, its base, rows, a recipe and runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import pytest
import yaml
from peft import get_peft_model
from scored_runs import write_run
from task_rows import write_data
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from moelora_plugin import MoeLoraConfig
from moelora_plugin.checkpoint import save_adapter
from moelora_plugin.training import load_recipe, train


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every test starts from; the adapter records the base by its place here."""
    folder = tmp_path_factory.mktemp("template")
    tiny_llama().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    write_data(folder / "rows", ["sst2", "rte"])
    config = MoeLoraConfig(
        r=2, num_experts=4, top_k=2, target_modules=["q_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
    save_adapter(model, folder / "adapter", tokenizer=tiny_tokenizer())
    write_run(folder / "one" / "moelora_eval.json")
    write_run(folder / "two" / "moelora_eval.json")
    recipe = {
        "model": {"name": str(folder / "base")},
        "adapter": {"preset": "moe_lora", "num_experts": 4, "top_k": 2, "r": 2},
        "data": {"tasks": ["sst2"], "data_dir": "rows"},
        "training": {"max_steps": 2, "save_steps": 1, "report_to": "none"},
        "output_dir": "run",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="session")
def trained(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the recipe of the template makes."""
    run = tmp_path_factory.mktemp("trained") / "run"
    train(load_recipe(template / "recipe.yaml", data_dir=template / "rows", output_dir=run))
    return run


@pytest.fixture
def work(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, a copy of the template."""
    folder = tmp_path / "work"
    shutil.copytree(template, folder, ignore=shutil.ignore_patterns("base"))
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MOELORA_DATA_DIR", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


@pytest.fixture
def ran(work: Path, trained: Path) -> Path:
    """The run of the recipe, in the current folder."""
    return Path(shutil.copytree(trained, work / "run"))
