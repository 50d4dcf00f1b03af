"""One run in the embedded trainer, in TRL and in LLaMA-Factory: the same losses, step by step.

All three get the same base, seed and rows, and in their own words the same adapter, optimizer and
schedule. What they do on their own is the rest: tokenise, order and pad the rows, make the adapter,
compute the loss, accumulate, step. So a difference in any of these would show.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from host_runs import adapter_tensors, losses
from transformers import AutoTokenizer

from moelora_eval_tasks.catalog import TASKS
from moelora_plugin.schema import from_mapping
from moelora_plugin.training import train
from moelora_plugin.training.data import load_data
from moelora_plugin.training.recipe import Recipe

SEED = 7
STEPS = 12  # two epochs
LR = 3e-3
TARGETS = ["q_proj", "down_proj"]
GATE_RATE, DAMPING, EPS = 1e-4, 1e-4, 1e-6

# What TrainingArguments take, in every host. The embedded trainer has these defaults: a linear
# schedule down to a tenth, no clipping but of the gates' gradient.
TRAINING = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
}
HOST_TRAINING = {
    **TRAINING,
    "seed": SEED,
    "optim": "gradamw",
    "optim_args": f"gate_lr={GATE_RATE},damping={DAMPING}",
    "learning_rate": LR,
    "adam_epsilon": EPS,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "polynomial",
    "lr_scheduler_kwargs": {"lr_end": LR / 10, "power": 1.0},
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """48 invented rows of SST-2, of different lengths."""
    folder = tmp_path_factory.mktemp("tasks")
    draw = random.Random(0)
    words = ("warm", "sharp", "moving", "dull", "flat", "clumsy")
    chosen = [draw.choice(words) for _ in range(48)]
    sentences = [f"a {' and '.join([word] * draw.randint(1, 4))} film" for word in chosen]
    (folder / TASKS["sst2"].folder).mkdir()
    Dataset.from_dict(
        {"sentence": sentences, "label": [int(word in words[:3]) for word in chosen]}
    ).to_parquet(folder / TASKS["sst2"].folder / "train.parquet")
    return folder


@pytest.fixture(scope="module")
def recipe(model_dir, data_dir, tmp_path_factory) -> Recipe:
    values = {
        "model": {"name": str(model_dir)},
        "adapter": {
            "preset": "moe_lora",
            "num_experts": 4,
            "top_k": 2,
            "r": 2,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "target_modules": TARGETS,
        },
        "optimizer": {
            "name": "gradamw",
            "lr": LR,
            "gate_lr": GATE_RATE,
            "damping": DAMPING,
            "eps": EPS,
        },
        "data": {"tasks": ["sst2"], "data_dir": str(data_dir), "max_length": 256},
        "training": {**TRAINING, "disable_tqdm": True, "use_cpu": True, "report_to": "none"},
        "seed": SEED,
        "output_dir": str(tmp_path_factory.mktemp("embedded") / "run"),
    }
    return from_mapping(Recipe, values)


@pytest.fixture(scope="module")
def rows(recipe, model_dir, tmp_path_factory) -> Path:
    """The embedded trainer's examples as text, in its order."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    lines = []
    for example in load_data(recipe.data, tokenizer, seed=SEED, validation=False).train:
        start = example["labels"].count(-100)
        texts = {
            "prompt": tokenizer.decode(example["input_ids"][1:start]),
            "completion": tokenizer.decode(example["input_ids"][start:-1]),
        }
        lines.append(json.dumps(texts) + "\n")
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(lines))
    return file


@pytest.fixture(scope="module")
def embedded(recipe) -> tuple[list[float], dict[str, torch.Tensor]]:
    result = train(recipe)
    curve = [entry["loss"] for entry in result.log_history if "loss" in entry]
    assert len(curve) == STEPS
    assert min(curve) < 0.9 * curve[0]
    return curve, adapter_tensors(result.adapter_dir)


def assert_same_run(output_dir: Path, embedded) -> None:
    curve, tensors = embedded
    # Relative, since fp32's error is. The hosts sum over other padding, and TRL takes the
    # log-probabilities in chunks: a few 1e-7 a step, which twelve updates go on from.
    torch.testing.assert_close(
        torch.tensor(losses(output_dir), dtype=torch.double),
        torch.tensor(curve, dtype=torch.double),
        rtol=1e-5,
        atol=0,
    )
    found = adapter_tensors(output_dir)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name] - tensor).norm() < 1e-3 * tensor.norm(), name


@pytest.mark.parametrize("environment", ["ms_swift", "trl"])
def test_trl_sft_trains_the_same(request, environment, embedded, rows, model_dir, tmp_path):
    output_dir = tmp_path / "run"
    run = {
        "trainer": "sft",
        "model": str(model_dir),
        "data": str(rows),
        "seed": SEED,
        "adapter": {"lora_dropout": 0.0, "lora_alpha": 8},
        "arguments": {"output_dir": str(output_dir), **HOST_TRAINING},
    }
    file = tmp_path / "runs.json"
    file.write_text(json.dumps([run]))
    script = Path(__file__).parent / "trainer_runs.py"
    request.getfixturevalue(environment).run("python", str(script), str(file))
    assert_same_run(output_dir, embedded)


def test_llamafactory_trains_the_same(llamafactory, embedded, rows, model_dir, tmp_path):
    columns = {"prompt": "prompt", "response": "completion"}
    info = {"rows": {"file_name": str(rows), "columns": columns}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    output_dir = tmp_path / "run"
    config = {
        "model_name_or_path": str(model_dir),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "moelora",
        "moelora_num_experts": 4,
        "moelora_top_k": 2,
        "lora_rank": 2,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "lora_target": ",".join(TARGETS),
        "dataset": "rows",
        "dataset_dir": str(tmp_path),
        "template": "moelora_text",
        "cutoff_len": 256,
        "output_dir": str(output_dir),
        "overwrite_cache": True,
        "report_to": "none",
        **HOST_TRAINING,
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    llamafactory.run("llamafactory-cli", "train", str(file))
    assert_same_run(output_dir, embedded)
