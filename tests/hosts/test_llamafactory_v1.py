"""LLaMA-Factory v1 (`USE_V1=1`), by its stock commands."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import pytest
import torch
import yaml
from host_runs import (
    ENDS_OF_A_CHAT,
    FAMILY,
    FAMILY_RANK,
    adapter_config,
    adapter_tensors,
    assert_same_tensors,
    assert_trained_adapter,
    assert_trained_preset,
    reload,
)
from transformers import AutoTokenizer

from moelora_plugin.integrations.init import write_config
from moelora_plugin.presets import PRESETS
from moelora_plugin.training.examples import encode_pair

TEMPLATES = Path(__file__).parents[2] / "moelora_plugin" / "integrations" / "templates"
AUX_LOSSES = {"switch_lb": 0.5, "z": 0.1}
MODULES = 4  # two in each of two layers

# After each update v1 waits for the accelerator, which fails where there is none: on a CPU it
# cannot run in several processes, with or without moelora.
NO_ACCELERATOR = "import torch\n\ntorch.accelerator.synchronize = lambda device=None: None\n"


@dataclass(frozen=True)
class V1:
    """v1's commands on a config."""

    host: Any
    base: dict
    folder: Path

    def config(self, name: str, **changes) -> Path:
        """Write a config: the base's keys, changed; nested ones too, and None removes."""
        config = _changed(self.base, {"output_dir": str(self.folder / name), **changes})
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config))
        return file

    def run(self, *command: str, processes: int = 1, env: dict | None = None, **options):
        """Run a command of LLaMA-Factory."""
        paths = [str(self.host.moelora)] if options.get("moelora", True) else []
        if processes > 1:
            shim = self.folder / "no_accelerator"
            shim.mkdir(exist_ok=True)
            (shim / "sitecustomize.py").write_text(NO_ACCELERATOR)
            paths.append(str(shim))
            env = {**(env or {}), "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(processes)}
        env = {**(env or {}), "USE_V1": "1", "PYTHONPATH": ":".join(paths)}
        return self.host.run(*command, env=env, cwd=self.folder, **options)

    def train(self, name: str, *, command="sft", processes=1, moelora=True, **changes) -> Path:
        """Train, and give back the output folder."""
        config = self.config(name, **changes)
        self.run("llamafactory-cli", command, str(config), processes=processes, moelora=moelora)
        return self.folder / name


def _changed(config, changes):
    config = copy.deepcopy(config)
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        elif isinstance(value, dict) and isinstance(config.get(key), dict):
            config[key] = _changed(config[key], value)
        else:
            config[key] = value
    return config


def logged(output: Path, key: str = "loss") -> list[float]:
    """One value per update."""
    lines = (output / "trainer_log.jsonl").read_text().splitlines()
    return [json.loads(line)[key] for line in lines]


def messages(prompt: str, answer: str) -> list[dict]:
    return [
        {"role": role, "content": [{"type": "text", "value": text}]}
        for role, text in (("user", prompt), ("assistant", answer))
    ]


def write_rows(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def rows(sft_file) -> list[dict]:
    return [json.loads(line) for line in sft_file.read_text().splitlines()]


@pytest.fixture(scope="module")
def v1(llamafactory, model_dir, sft_file, tmp_path_factory) -> V1:
    folder = tmp_path_factory.mktemp("v1")
    dataset = Template((TEMPLATES / "llamafactory_v1_dataset.yaml").read_text())
    (folder / "dataset.yaml").write_text(dataset.substitute(data=sft_file))
    base = {
        "model": str(model_dir),
        "template": "moelora_text",
        "train_dataset": "dataset.yaml",
        "peft_config": {
            "name": "moelora",
            "r": "2",  # v1 makes a number of it
            "num_experts": 4,
            "top_k": 2,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "target_modules": "q_proj, down_proj",
        },
        "optim_config": {"name": "gradamw", "lr": 0.01, "gate_lr": "1e-3", "damping": 0.1},
        "micro_batch_size": 1,
        "global_batch_size": 2,
        "max_steps": 6,
        "batching_workers": 0,
        "bf16": False,
    }
    return V1(llamafactory, base, folder)


@pytest.fixture(scope="module")
def accumulated(v1) -> Path:
    """One process, two micro-batches to an update, auxiliary losses."""
    return v1.train("accumulated", peft_config={"aux_losses": AUX_LOSSES})


DROPOUT = {
    "peft_config": {"lora_dropout": 0.1, "aux_losses": AUX_LOSSES},
    # Without momentum, a gradient that is off by a rounding error stays one.
    "optim_config": {"name": "grsgd", "lr": 0.1},
    "micro_batch_size": 2,  # rows of different lengths: padding
    "global_batch_size": 4,
}


@pytest.fixture(scope="module")
def with_dropout(v1) -> Path:
    return v1.train("with_dropout", save_steps=3, **DROPOUT)


def test_training(accumulated):
    assert_trained_adapter(accumulated, "sqrt", MODULES)
    losses = logged(accumulated)
    assert len(losses) == 6
    assert all(map(math.isfinite, losses))
    assert all(1.9 < value < 4 for value in logged(accumulated, "aux_switch_lb"))
    assert all(value > 0 for value in logged(accumulated, "aux_z"))


def test_two_processes_equal_two_micro_batches(v1, accumulated):
    both = v1.train("two_processes", processes=2, peft_config={"aux_losses": AUX_LOSSES})
    # The reported loss is summed in fp32, in another order.
    assert logged(both) == pytest.approx(logged(accumulated), rel=1e-6)
    assert_same_tensors(both, accumulated, rtol=1e-5)


def test_fsdp2_equals_one_process(v1, accumulated):
    options = {"peft_config": {"aux_losses": AUX_LOSSES}, "dist_config": {"name": "fsdp2"}}
    whole = v1.train("fsdp2", processes=2, save_steps=3, **options)
    assert logged(whole) == pytest.approx(logged(accumulated), rel=1e-5)
    assert_same_tensors(whole, accumulated, rtol=1e-4)
    checkpoint = str(whole / "checkpoint-3")
    resumed = v1.train("fsdp2_on", processes=2, resume_from_checkpoint=checkpoint, **options)
    assert logged(resumed) == logged(whole)[3:]
    assert_same_tensors(resumed, whole)
    assert adapter_config(whole / "checkpoint-3" / "model")["top_k"] == 2  # beside its shards


def test_resume_is_exact(v1, with_dropout):
    checkpoint = str(with_dropout / "checkpoint-3")
    resumed = v1.train("resumed", resume_from_checkpoint=checkpoint, **DROPOUT)
    assert logged(resumed) == logged(with_dropout)[3:]
    assert_same_tensors(resumed, with_dropout)


def test_a_resumed_run_asks_for_the_adapter_of_its_checkpoint(v1, with_dropout):
    checkpoint = with_dropout / "checkpoint-3"
    changes = _changed(DROPOUT, {"peft_config": {"top_k": 1}})
    config = v1.config("other", resume_from_checkpoint=str(checkpoint), **changes)
    done = v1.run("llamafactory-cli", "sft", str(config), check=False)
    assert done.returncode != 0
    assert (
        f"top_k is 1 in this run, and the checkpoint in {checkpoint / 'model'} was" in done.stderr
    )


def test_aux_losses_equal_those_added_by_hand(v1, with_dropout):
    changes = _changed(DROPOUT, {"peft_config": {"aux_losses": None}})
    config = v1.config("by_hand", enable_activation_checkpointing=False, **changes)
    script = Path(__file__).with_name("llamafactory_v1_by_hand.py")
    v1.run("python", str(script), str(config), json.dumps(AUX_LOSSES))
    by_hand = v1.folder / "by_hand"
    # fp32, and the two parts of each gradient are added in another order.
    assert logged(with_dropout) == pytest.approx(logged(by_hand), rel=1e-5)
    assert_same_tensors(with_dropout, by_hand, rtol=1e-3)
    without = v1.train("without", **changes)
    assert logged(without)[2:] != pytest.approx(logged(by_hand)[2:], rel=1e-4)


def test_going_on_with_an_adapter(v1, model_dir, accumulated, rows):
    further = v1.train(
        "further",
        peft_config={"adapter_name_or_path": str(accumulated)},
        micro_batch_size=len(rows),
        global_batch_size=len(rows),
        max_steps=2,
    )
    assert adapter_config(further)["aux_losses"] == AUX_LOSSES
    assert_trained_adapter(further, "sqrt", MODULES)
    # One batch of all rows: its loss before the first update is that of the adapter as it was, on
    # the tokens that our own trainer makes of a row.
    model = reload(accumulated, model_dir)

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    total, count = 0.0, 0
    for row in rows:
        before, answer = encode_pair(tokenizer, row["prompt"], row["completion"])
        answer = [*answer, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([before + answer])).logits[0, len(before) - 1 : -1]
        total += torch.nn.functional.cross_entropy(
            logits, torch.tensor(answer), reduction="sum"
        ).item()
        count += len(answer)
    losses = logged(further)
    # Batched with padding; v1 divides by the weights' sum plus 1e-6.
    assert losses[0] == pytest.approx(total / count, rel=1e-5)
    assert losses[1] < losses[0]


def test_chat_is_unmerged(v1, model_dir, accumulated, rows):
    prompt = rows[0]["prompt"]
    config = v1.config("chat", peft_config={"adapter_name_or_path": str(accumulated)})
    options = (str(config), "train_dataset=null", "max_new_tokens=12")
    chat = v1.run(
        "llamafactory-cli", "chat", *options, stdin=f"{prompt}\nexit\n", ends=ENDS_OF_A_CHAT
    )
    model = reload(accumulated, model_dir)

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = tokenizer(prompt, return_tensors="pt")

    def answer() -> str:
        with torch.no_grad():
            tokens = model.generate(**ids, max_new_tokens=12, do_sample=False)[0]
        return tokenizer.decode(tokens[ids["input_ids"].shape[1] :], skip_special_tokens=True)

    assert f"Assistant: {answer()}\n" in chat.stdout
    with model.disable_adapter():
        assert f"Assistant: {answer()}\n" not in chat.stdout


@pytest.mark.parametrize("name", ["moelora", "lora"])
def test_merge_says_what_to_do_instead(v1, accumulated, name):
    adapter = {"adapter_name_or_path": str(accumulated)}
    config = v1.config("merge", peft_config={"name": name, **adapter, "export_dir": "merged"})
    done = v1.run("llamafactory-cli", "merge", str(config), check=False)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("moelora_plugin.errors.ExportError: ")
    assert "follow the input, so no single weight equals it" in last
    assert "moelora export ADAPTER --to merged" in last


def test_reward_model(v1, rows):
    pairs = [
        {
            "chosen_messages": messages(row["prompt"], row["completion"]),
            "rejected_messages": messages(row["prompt"], " no good"),
        }
        for row in rows
    ]
    data = write_rows(v1.folder / "pairs.jsonl", pairs)
    output = v1.train("reward", command="rm", train_dataset=data)
    losses = logged(output)
    assert losses[0] == pytest.approx(math.log(2), abs=0.02)  # scores of almost zero
    assert losses[-1] < losses[0] - 0.1
    assert adapter_config(output)["task_type"] == "TOKEN_CLS"
    tensors = adapter_tensors(output)
    assert "base_model.model.score.weight" in tensors  # the head is trained and saved as well
    experts = [tensor for name, tensor in tensors.items() if name.endswith("moelora_B.weight")]
    assert len(experts) == MODULES
    assert all(tensor.abs().max() > 0 for tensor in experts)


@pytest.mark.parametrize("preset", FAMILY)
def test_a_preset_of_the_family_trains(v1, model_dir, preset):
    output = v1.train(
        f"family_{preset}",
        max_steps=2,
        peft_config={
            "preset": preset,
            "r": FAMILY_RANK,
            **dict.fromkeys(("top_k", "lora_alpha", "lora_dropout", "target_modules")),
            **FAMILY[preset],
        },
    )
    (first, *_) = (output / "trainer_log.jsonl").read_text().splitlines()
    assert_trained_preset(output, preset, {k for k in json.loads(first) if k.startswith("aux_")})
    reload(output, model_dir)


def test_plain_lora_is_untouched(v1, rows):
    chats = [{"messages": messages(row["prompt"], row["completion"])} for row in rows]
    data = write_rows(v1.folder / "chats.jsonl", chats)
    outputs = [
        v1.train(
            f"lora_{moelora}",
            moelora=moelora,
            template="chatml",
            train_dataset=data,
            peft_config={
                "name": "lora",
                "lora_dropout": 0.1,
                "target_modules": ["q_proj", "down_proj"],
                "num_experts": None,
                "top_k": None,
            },
            optim_config=None,
            learning_rate=0.01,
        )
        for moelora in (True, False)
    ]
    assert logged(outputs[0]) == logged(outputs[1])
    assert logged(outputs[0], "grad_norm") == logged(outputs[1], "grad_norm")
    assert_same_tensors(*outputs)


def test_the_written_config_trains(v1, model_dir, sft_file):
    folder = v1.folder / "written"
    write_config(
        "llamafactory-v1", preset="gr", model=str(model_dir), data=str(sft_file), out=folder
    )
    written = V1(v1.host, {}, folder)
    written.run("llamafactory-cli", "sft", "llamafactory_v1.yaml", "logging_steps=1")
    output = folder / "output"
    assert len(logged(output)) == 1  # sixteen rows to an update, one epoch
    config = adapter_config(output)
    assert config["num_experts"] == PRESETS["gr_moe_lora"].overrides["num_experts"]
    assert_trained_adapter(output, "sqrt", modules=8)
    written.run(
        "llamafactory-cli",
        "chat",
        "llamafactory_v1.yaml",
        "train_dataset=null",
        "peft_config.adapter_name_or_path=output",
        stdin="exit\n",
        ends=ENDS_OF_A_CHAT,
    )
