"""What is mutated: adapters, recipes, reports, clusters and allocations, small and whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import get_peft_model
from scored_runs import hits, scored
from task_rows import write_data
from tiny import tiny_llama, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from moelora_plugin import MoeLoraConfig
from moelora_plugin.checkpoint import save_adapter
from moelora_plugin.clusters import ClusterAssigner
from moelora_plugin.clusters.features import FEATURES
from moelora_plugin.training import load_recipe
from moelora_plugin.training.data import TaskRows

SMALL: dict[str, Any] = {
    "r": 2,
    "num_experts": 4,
    "top_k": 2,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rich": {
        "router_modifiers": {"temperature": 0.5, "balance_bias": {}},
        "aux_losses": {"switch_lb": 0.01},
        "allocation": "pattern",
        "allocation_kwargs": {"r": {"q_proj": [1, 2, 3, 4]}},
        "init": "pissa",
        "gate_rescale": "sqrt",
        "modules_to_save": ["lm_head"],
    },
    "block": {
        "site": "block",
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
        "router": "softmax",
        "use_rslora": True,
    },
    "clusters": {
        "router_input": "cluster",
        "router_score": "embedding",
        "router_score_kwargs": {"num_ids": 3},
        "expert": "shared_a",
        "exclude_modules": ["lm_head"],
    },
}


@dataclass(frozen=True)
class Artefacts:
    """Whole artefacts to copy from, and what they are loaded with.

    Attributes:
        folder: holds base, adapter-*, recipe, run, clusters, allocation; `rows` and `canary`.
        base: the base's folder.
        model: the base, loaded.
        canary: a folder that nothing may read or write.
    """

    folder: Path
    base: Path
    model: PreTrainedModel
    canary: Path


def make(folder: Path) -> Artefacts:
    """Write every artefact into `folder`."""
    base, canary = folder / "base", folder / "canary"
    tiny_llama(vocab_size=512, hidden=16).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    _write_recipe(folder / "recipe", base)
    trained = manifest(folder / "recipe" / "recipe.yaml")
    for name, fields in ADAPTERS.items():
        model = get_peft_model(_load(base), MoeLoraConfig(**{**SMALL, **fields}))
        _shake(model)
        save_adapter(
            model, folder / f"adapter-{name}", tokenizer=tiny_tokenizer(), manifest=trained
        )
    write_data(folder / "rows", ["sst2", "rte"])
    shares = {"base": hits(40, 0.6, 0), "adapter": hits(40, 0.8, 1)}
    scored({"sst2": shares}).write(folder / "run" / "moelora_eval.json")
    features = FEATURES["embedding"](_load(base), 0)
    ClusterAssigner(features, torch.randn(3, 16), (4, 3, 2)).save(folder / "clusters")
    (folder / "allocation").mkdir()
    entries = {
        f"model.layers.{i}.self_attn.{kind}": {"ranks": [1, 2, 1], "top_k": 2}
        for i in range(2)
        for kind in ("q_proj", "v_proj")
    }
    (folder / "allocation" / "allocation.json").write_text(json.dumps(entries))
    canary.mkdir()
    (canary / "secret.json").write_text('{"secret": {"ranks": [1]}}')
    (canary / "fuzz_payload.py").write_text(PAYLOAD)
    return Artefacts(folder, base, _load(base), canary)


# A module of a stranger's: importing it, calling or making what it holds leaves a trace.
PAYLOAD = """
from pathlib import Path

trace = Path(__file__).with_name("RAN")
trace.touch()


class Part:
    def __init__(self, *args, **kwargs):
        trace.touch()


def part(*args, **kwargs):
    trace.touch()
"""


def manifest(recipe: Path) -> dict[str, Any]:
    """How an adapter came about, as training notes it."""
    layer = {"tokens": 90, "load": [0.5, 0.3, 0.2, 0.0], "weight": [0.5, 0.3, 0.2, 0.0]}
    settings = load_recipe(recipe).to_dict()
    del settings["output_dir"], settings["data"]["data_dir"], settings["data"]["clusters"]
    return {
        "recipe": settings,
        "data": [asdict(TaskRows("sst2", "train", None, rows=8, cut_rows=0))],
        "image_processor": None,
        "steps": 10,
        "train_loss": 0.5,
        "eval_loss": None,
        "trainable_parameters": 1000,
        "seconds": 1.5,
        "packages": {"torch": "2.13.0"},
        "routing": {
            f"model.layers.{i}.self_attn.q_proj": {**layer, "entropy": 0.9, "not_finite": 0}
            for i in range(2)
        },
    }


def copy(artefacts: Artefacts, name: str, to: Path) -> Path:
    """A fresh copy of one artefact."""
    return Path(shutil.copytree(artefacts.folder / name, to / name))


def _load(base: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base)
    return model


def _shake(model: nn.Module) -> None:
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "moelora_" in name and parameter.is_floating_point():
            parameter.data += 0.1 * torch.randn_like(parameter)


def _write_recipe(folder: Path, base: Path) -> None:
    folder.mkdir()
    recipe = {
        "model": {"name": str(base), "dtype": "float32"},
        "adapter": {"preset": "mola", "num_experts": 4, "top_k": 2, "r": 2},
        "optimizer": {"name": "gradamw", "lr": 1e-4, "gate_lr": 1e-6},
        "data": {"tasks": ["sst2"], "data_dir": "rows", "max_length": 64, "limit": 8},
        "training": {"max_steps": 1, "per_device_train_batch_size": 2},
        "output_dir": "out",
        "seed": 0,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
