"""LLaMA-Factory's classic commands: train, chat, export, with `finetuning_type: moelora`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from string import Template

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
    losses,
    reload,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from moelora_eval_tasks.prompts import Prompt
from moelora_plugin import PRESETS, build_optimizer
from moelora_plugin.training.examples import AnswerCollator, build_example

HERE = Path(__file__).parent
TEMPLATES = HERE.parents[1] / "moelora_plugin" / "integrations" / "templates"
MODULES = 4  # q_proj and down_proj in two layers
AUX = {"switch_lb": 0.5}

MIXTURE = {
    "finetuning_type": "moelora",
    "moelora_num_experts": 4,
    "moelora_top_k": 2,
    "lora_rank": 2,
    "lora_dropout": 0.0,
    "optim": "gradamw",
    "optim_args": "gate_lr=1e-3,damping=1e-4",
}


@pytest.fixture(scope="module")
def data(sft_file, dpo_file, tmp_path_factory) -> Path:
    """A folder with the file that tells LLaMA-Factory of its data."""
    folder = tmp_path_factory.mktemp("data")
    rows = [json.loads(line) for line in sft_file.read_text().splitlines()]
    kto = folder / "kto.jsonl"
    kto.write_text(
        "".join(json.dumps({**row, "label": i % 2 == 0}) + "\n" for i, row in enumerate(rows))
    )
    answered = {"prompt": "prompt", "response": "completion"}
    pairs = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    info = {
        "sft": {"file_name": str(sft_file), "columns": answered},
        "pt": {"file_name": str(sft_file), "columns": {"prompt": "prompt"}},
        "pairs": {"file_name": str(dpo_file), "ranking": True, "columns": pairs},
        "kto": {"file_name": str(kto), "columns": {**answered, "kto_tag": "label"}},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="module")
def config(model_dir, data, tmp_path_factory):
    """A run's settings; `output_dir` is a new folder."""

    def settings(**changes):
        return {
            "model_name_or_path": str(model_dir),
            "stage": "sft",
            "do_train": True,
            "lora_target": "q_proj,down_proj",
            "dataset": "sft",
            "dataset_dir": str(data),
            "template": "moelora_text",
            "cutoff_len": 256,
            "output_dir": str(tmp_path_factory.mktemp("out")),
            "logging_steps": 1,
            "save_strategy": "no",
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.01,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **changes,
        }

    return settings


@pytest.fixture(scope="module")
def train(llamafactory, config, tmp_path_factory):
    """Run `llamafactory-cli train` and answer with its output folder."""

    def run(host=None, **changes):
        settings = config(**changes)
        file = tmp_path_factory.mktemp("config") / "train.yaml"
        file.write_text(yaml.safe_dump(settings))
        llamafactory.run("llamafactory-cli", "train", str(file), **(host or {}))
        return Path(settings["output_dir"])

    return run


@pytest.fixture(scope="module")
def trained(train) -> Path:
    """Eight steps with dropout, an auxiliary loss and a checkpoint in the middle."""
    return train(
        **{**MIXTURE, "lora_dropout": 0.1},
        moelora_aux_losses=AUX,
        max_steps=8,
        save_strategy="steps",
        save_steps=4,
    )


@pytest.fixture(scope="module")
def accumulated(train) -> Path:
    """Two micro-batches of one row to an update."""
    return train(
        **MIXTURE,
        moelora_aux_losses=AUX,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )


def test_a_training_leaves_a_whole_adapter(trained):
    assert_trained_adapter(trained, gate_rescale="sqrt", modules=MODULES)
    config = adapter_config(trained)
    assert (config["num_experts"], config["top_k"], config["r"]) == (4, 2, 2)
    assert config["lora_alpha"] == 16  # the preset's, not LLaMA-Factory's twice the rank
    assert config["lora_dropout"] == 0.1
    assert config["aux_losses"] == AUX
    assert len(losses(trained)) == 8
    assert all(math.isfinite(loss) for loss in losses(trained))
    balance = losses(trained, "aux_switch_lb")
    assert len(balance) == 8
    assert balance[-1] < balance[0]


def test_a_resumed_run_is_the_uninterrupted_one(train, trained):
    resumed = train(
        **{**MIXTURE, "lora_dropout": 0.1},
        moelora_aux_losses=AUX,
        max_steps=8,
        resume_from_checkpoint=str(trained / "checkpoint-4"),
    )
    assert losses(resumed) == losses(trained)
    assert losses(resumed, "aux_switch_lb") == losses(trained, "aux_switch_lb")
    assert_same_tensors(resumed, trained)
    # It has trained the last four steps only: the Trainer divides their sum by all eight.
    results = json.loads((resumed / "train_results.json").read_text())
    assert results["train_loss"] == pytest.approx(sum(losses(trained)[4:]) / 8)


def test_a_resumed_run_asks_for_the_adapter_of_its_checkpoint(
    llamafactory, config, trained, tmp_path
):
    checkpoint = str(trained / "checkpoint-4")
    changes = {**MIXTURE, "lora_dropout": 0.1, "moelora_top_k": 1, "moelora_aux_losses": AUX}
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(config(**changes, resume_from_checkpoint=checkpoint)))
    done = llamafactory.run("llamafactory-cli", "train", str(file), check=False)
    assert done.returncode != 0
    assert f"top_k is 1 in this run, and the checkpoint in {checkpoint} was" in done.stderr


def test_two_processes_are_one_with_accumulation(train, accumulated):
    two = train(
        {"env": {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}},
        **MIXTURE,
        moelora_aux_losses=AUX,
        per_device_train_batch_size=1,
        ddp_backend="gloo",
    )
    # Sums over the two rows are taken in another order: 1e-7 of rounding, grown by four updates.
    assert losses(two) == pytest.approx(losses(accumulated), rel=1e-5)
    assert_same_tensors(two, accumulated, rtol=1e-3)


def test_auxiliary_losses_are_those_added_by_hand(
    llamafactory, train, config, data, tmp_path_factory
):
    """With rows of two lengths in a batch, accumulation and a shorter last update."""
    changes = {
        **MIXTURE,
        # A plain update, which does not divide small differences by their own size.
        "optim": "grsgd",
        "optim_args": "gate_lr=0.1,gate_max_grad_norm=null,damping=0.1",
        "gradient_accumulation_steps": 3,
        "num_train_epochs": 2,
        "max_steps": -1,
    }
    ours = train(**changes, moelora_aux_losses=AUX)
    # The routers' hooks must not see a recomputation, which ours copes with above.
    settings = config(**changes, disable_gradient_checkpointing=True)
    file = tmp_path_factory.mktemp("config") / "by_hand.json"
    file.write_text(json.dumps(settings))
    llamafactory.run("python", str(HERE / "llamafactory_by_hand.py"), str(file), json.dumps(AUX))
    theirs = Path(settings["output_dir"])
    assert_same_tensors(ours, theirs, rtol=1e-4)
    assert losses(theirs) != pytest.approx(losses(ours), rel=1e-3)  # theirs counts it in


def test_a_continued_adapter_trains_as_in_a_loop_by_hand(train, trained, sft_file, model_dir):
    start = train(**MIXTURE, max_steps=2)
    continued = train(
        finetuning_type="moelora",
        optim="gradamw",
        optim_args=MIXTURE["optim_args"],
        adam_epsilon=1e-4,
        adapter_name_or_path=str(start),
        disable_shuffling=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )
    model = reload(start, model_dir).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("moelora_" in name)
    optimizer = build_optimizer(model, "gradamw", lr=0.01, gate_lr=1e-3, damping=1e-4, eps=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = [json.loads(line) for line in sft_file.read_text().splitlines()]
    expected = []
    for step in range(4):
        examples = [
            build_example(tokenizer, Prompt(row["prompt"], (row["completion"],), 0), 256)
            for row in rows[2 * step : 2 * step + 2]
        ]
        loss = model(**AnswerCollator(tokenizer.pad_token_id)(examples)).loss
        expected.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses(continued) == pytest.approx(expected, rel=1e-5)
    assert losses(continued)[-1] != losses(continued)[0]


# Of an adapter with `MIXTURE`'s keys: what a run that goes on from it may say, and what it may not.
CONTINUED = {
    "nothing": ({}, None),
    "the same": (
        {"moelora_top_k": 2, "moelora_num_experts": 4, "lora_rank": 2, "use_rslora": False},
        None,
    ),
    "the same modules by other names": ({"lora_target": "self_attn.q_proj,mlp.down_proj"}, None),
    "another type": (
        {"finetuning_type": "lora"},
        " is a mixture of LoRA experts; set finetuning_type: moelora to train it on.",
    ),
    "a preset": (
        {"moelora_preset": "gr_exact", "lora_rank": 2},
        "moelora_gate_rescale is 'exact', but {} 'sqrt'",
    ),
    "experts": ({"moelora_num_experts": 20}, "moelora_num_experts is 20, but {} 4"),
    "top_k": ({"moelora_top_k": 1}, "moelora_top_k is 1, but {} 2"),
    "rank": ({"lora_rank": 4}, "lora_rank is 4, but {} 2"),
    "alpha": ({"lora_alpha": 32}, "lora_alpha is 32, but {} 16"),
    "dropout": ({"lora_dropout": 0.3}, "lora_dropout is 0.3, but {} 0.0"),
    "rslora": ({"use_rslora": True}, "use_rslora is True, but {} False"),
    "whole modules": (
        {"additional_target": "lm_head"},
        "additional_target is ['lm_head'], but {} None",
    ),
    "fewer targets": (
        {"lora_target": "q_proj"},
        "lora_target is ['q_proj'], but {} ['down_proj', 'q_proj']",
    ),
    "all targets": ({"lora_target": "all"}, "lora_target is 'all-linear', but {} ['down"),
    "new blocks": (
        {"use_llama_pro": True, "freeze_trainable_layers": 1, "lora_target": None},
        "lora_target is ",
    ),
    "pissa": ({"pissa_init": True}, "pissa_init does not go with finetuning_type: moelora"),
    "dora": ({"use_dora": True}, "use_dora does not go with finetuning_type: moelora"),
    "a new one on top": (
        {"create_new_adapter": True},
        "create_new_adapter: true merges the adapters before it into the base. The gates",
    ),
    "two mixtures": (
        {"adapter_name_or_path": "{},{}"},
        "adapter_name_or_path merges all adapters but the last into the base. The gates",
    ),
    "answering with other keys": (
        {"moelora_top_k": 1, "do_train": False},
        "moelora_top_k is 1, but {} 2",
    ),
}


@pytest.fixture(scope="module")
def continued(llamafactory, config, accumulated, tmp_path_factory):
    """What LLaMA-Factory says to each of CONTINUED when it has the base, in one start."""
    cases = []
    for changes, _ in CONTINUED.values():
        settings = {"adapter_name_or_path": "{}", "lora_target": None, **MOELORA, **changes}
        path = settings["adapter_name_or_path"].replace("{}", str(accumulated))
        settings = config(**{**settings, "adapter_name_or_path": path})
        args = {key: value for key, value in settings.items() if value is not None}
        infers = not args["do_train"]
        if infers:
            kept = {"model_name_or_path", "adapter_name_or_path", "template", "finetuning_type"}
            args = {k: v for k, v in args.items() if k in {*kept, *changes} - {"do_train"}}
        cases.append({"args": args, "adapts": True, "infer": infers})
    file = tmp_path_factory.mktemp("continued") / "cases.json"
    file.write_text(json.dumps(cases))
    output = llamafactory.run("python", str(HERE / "llamafactory_refusals.py"), str(file)).stdout
    return dict(zip(CONTINUED, json.loads(output.rpartition("ANSWERS")[2]), strict=True))


@pytest.mark.parametrize("case", CONTINUED)
def test_a_continued_adapter_must_be_the_one_that_the_file_asks_for(continued, accumulated, case):
    said = CONTINUED[case][1]
    if said is None:
        assert "error" not in continued[case], continued[case]
        return
    where = f"the adapter in {accumulated} was trained with"
    assert said.format(where) in continued[case]["message"], continued[case]
    assert continued[case]["error"] in ("ConfigError", "ExportError")


def question(sft_file: Path) -> str:
    return json.loads(sft_file.read_text().splitlines()[0])["prompt"]


@pytest.fixture(scope="module")
def chat(llamafactory, model_dir, sft_file, tmp_path_factory):
    """What `llamafactory-cli chat` answers to the first row's prompt."""

    def ask(*adapters):
        file = tmp_path_factory.mktemp("chat") / "chat.yaml"
        settings = {
            "model_name_or_path": str(model_dir),
            "adapter_name_or_path": ",".join(map(str, adapters)),
            "template": "moelora_text",
            "do_sample": False,
            "max_new_tokens": 12,
            "infer_dtype": "float32",
        }
        file.write_text(yaml.safe_dump(settings))
        asked = f"{question(sft_file)}\nexit\n"
        done = llamafactory.run(
            "llamafactory-cli", "chat", str(file), stdin=asked, ends=ENDS_OF_A_CHAT
        )
        output = done.stdout
        return output.partition("Assistant: ")[2].partition("\nUser: ")[0].strip("\n")

    return ask


def generated(model, model_dir: Path, prompt: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.eval().generate(**inputs, do_sample=False, max_new_tokens=12)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_chat_answers_with_the_unmerged_adapter(chat, trained, model_dir, sft_file):
    """`adapter_name_or_path` alone is enough."""
    expected = generated(reload(trained, model_dir), model_dir, question(sft_file))
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    assert expected != generated(base, model_dir, question(sft_file))
    assert chat(trained) == expected


def test_chat_adds_up_the_adapters_of_a_list(chat, trained, accumulated, model_dir, sft_file):
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    model = PeftModel.from_pretrained(base, str(trained))
    model.load_adapter(str(accumulated), "second")
    model.base_model.set_adapter(["default", "second"])
    expected = generated(model, model_dir, question(sft_file))
    one = generated(reload(accumulated, model_dir), model_dir, question(sft_file))
    assert expected != one
    assert chat(trained, accumulated) == expected


def test_export_names_our_own(llamafactory, trained, model_dir, tmp_path):
    file = tmp_path / "export.yaml"
    settings = {
        "model_name_or_path": str(model_dir),
        "adapter_name_or_path": str(trained),
        "template": "moelora_text",
        "export_dir": str(tmp_path / "exported"),
    }
    file.write_text(yaml.safe_dump(settings))
    done = llamafactory.run("llamafactory-cli", "export", str(file), check=False)
    assert done.returncode != 0
    assert "ExportError: The gates of this adapter follow the input" in done.stderr
    assert "`moelora export ADAPTER --to merged --strategy mean-gate --out DIR`" in done.stderr
    assert not (tmp_path / "exported").exists()


def test_one_expert_is_merged_exactly(llamafactory, train, model_dir, tmp_path):
    adapter = train(**MIXTURE | {"moelora_num_experts": 1, "moelora_top_k": 1}, max_steps=2)
    file = tmp_path / "export.yaml"
    settings = {
        "model_name_or_path": str(model_dir),
        "adapter_name_or_path": str(adapter),
        "template": "moelora_text",
        "export_dir": str(tmp_path / "exported"),
        "infer_dtype": "float32",
    }
    file.write_text(yaml.safe_dump(settings))
    llamafactory.run("llamafactory-cli", "export", str(file))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokens = torch.arange(3, 35).view(2, 16)
    expected = reload(adapter, model_dir)(tokens).logits
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_dpo_starts_from_the_base_as_reference(train):
    out = train(**MIXTURE, stage="dpo", dataset="pairs", moelora_aux_losses=AUX, pref_beta=0.5)
    assert_trained_adapter(out, gate_rescale="sqrt", modules=MODULES)
    # New experts change nothing, so policy and reference agree.
    assert losses(out)[0] == pytest.approx(math.log(2), rel=1e-6)
    assert losses(out)[-1] != pytest.approx(math.log(2), rel=1e-2)
    assert len(losses(out, "aux_switch_lb")) == 4


def test_kto_starts_from_the_base_as_reference(train):
    out = train(**MIXTURE, stage="kto", dataset="kto")
    assert_trained_adapter(out, gate_rescale="sqrt", modules=MODULES)
    assert losses(out)[0] == pytest.approx(0.5, rel=1e-6)
    assert losses(out)[-1] != pytest.approx(0.5, rel=1e-2)


@pytest.mark.parametrize(
    ("stage", "dataset", "start"), [("dpo", "pairs", math.log(2)), ("kto", "kto", 0.5)]
)
def test_a_trained_adapter_is_its_own_reference(
    train, accumulated, model_dir, stage, dataset, start
):
    """`adapter_name_or_path` goes on training, `ref_model_adapters` stands still."""
    changes = {**MIXTURE, "stage": stage, "dataset": dataset, "pref_beta": 0.5}
    changes |= {"adapter_name_or_path": str(accumulated), "moelora_aux_losses": AUX}
    out = train(**changes, ref_model=str(model_dir), ref_model_adapters=str(accumulated))
    assert losses(out)[0] == pytest.approx(start, rel=1e-6)
    assert len(set(losses(out))) == len(losses(out))
    before, after = adapter_tensors(accumulated), adapter_tensors(out)
    assert after.keys() == before.keys()
    assert not any(torch.equal(after[name], before[name]) for name in before)
    # Without one LLaMA-Factory switches the adapter off: the base is the reference.
    alone = train(**changes, max_steps=1)
    assert losses(alone)[0] != pytest.approx(start, rel=1e-3)


def test_pretraining(train):
    out = train(**MIXTURE, stage="pt", dataset="pt", cutoff_len=32, num_train_epochs=2)
    assert_trained_adapter(out, gate_rescale="sqrt", modules=MODULES)
    assert losses(out)[-1] < losses(out)[0]


def test_a_reward_model_trains_its_head_too(train):
    out = train(**MIXTURE, stage="rm", dataset="pairs", save_strategy="steps", save_steps=4)
    assert_trained_adapter(out, gate_rescale="sqrt", modules=MODULES)
    assert all(math.isfinite(loss) for loss in losses(out))
    assert (out / "value_head.safetensors").exists()


@pytest.mark.parametrize("preset", FAMILY)
def test_a_preset_of_the_family_trains(train, model_dir, preset):
    folder = train(
        finetuning_type="moelora",
        lora_target=None,
        lora_rank=FAMILY_RANK,
        optim="gradamw",
        max_steps=2,
        moelora_preset=preset,
        **{f"moelora_{key}": value for key, value in FAMILY[preset].items()},
    )
    logged = json.loads((folder / "trainer_state.json").read_text())["log_history"][0]
    assert_trained_preset(folder, preset, {key for key in logged if key.startswith("aux_")})
    reload(folder, model_dir)


def test_plain_lora_does_not_notice_us(train):
    lora = {"finetuning_type": "lora", "optim": "adamw_torch", "template": "fewshot"}
    without = train({"moelora": False}, **lora)
    beside = train(**lora)
    assert losses(beside) == losses(without)
    ours, theirs = adapter_config(beside), adapter_config(without)
    ours["target_modules"].sort()  # PEFT writes a set
    theirs["target_modules"].sort()
    assert ours == theirs
    assert (ours["r"], ours["lora_alpha"]) == (8, 16)
    assert_same_tensors(beside, without)


def test_the_config_of_moelora_init_trains(llamafactory, model_dir, sft_file, tmp_path):
    values = {
        "model": str(model_dir),
        "preset": "gr_moe_lora",
        "optimizer": "gradamw",
        "gate_lr": "3.0e-8",
        "data": str(sft_file),
        "output_dir": str(tmp_path / "out"),
        "target_modules": "q_proj,down_proj",
        "task": "sst2",
    }
    names = {"llamafactory.yaml": "llamafactory.yaml"}
    names["llamafactory_dataset_info.json"] = "dataset_info.json"
    for template, name in names.items():
        text = Template((TEMPLATES / template).read_text()).substitute(values)
        (tmp_path / name).write_text(text)
    short = ["max_steps=2", "logging_steps=1", "save_steps=2", "bf16=false"]
    run = llamafactory.run("llamafactory-cli", "train", "llamafactory.yaml", *short, cwd=tmp_path)
    assert "<s>Sentence: the positive is number 0. The correct answer is positive</s>" in run.stdout
    assert_trained_adapter(tmp_path / "out", gate_rescale="sqrt", modules=MODULES)
    config = adapter_config(tmp_path / "out")
    preset = PRESETS["gr_moe_lora"].overrides
    assert {key: config[key] for key in preset} == preset


@pytest.fixture(scope="module")
def answers(llamafactory, config, trained, tmp_path_factory):
    """What the parser says to each case of CASES, in one start."""

    def arguments(case):
        changes = {k: v for k, v in case.items() if k not in ("env", "infer", "argv")}
        settings = {k: v for k, v in config(**changes).items() if v is not None}
        if case.get("infer"):
            kept = ("model_name_or_path", "template", *changes)
            settings = {key: settings[key] for key in kept}
        if not case.get("argv"):
            return settings
        return [word for k, v in settings.items() for word in (f"--{k}", str(v))]

    cases = [
        {"args": arguments(case), "env": case.get("env", {}), "infer": case.get("infer", False)}
        for case in CASES.values()
    ]
    file = tmp_path_factory.mktemp("cases") / "cases.json"
    file.write_text(json.dumps(cases))
    output = llamafactory.run("python", str(HERE / "llamafactory_refusals.py"), str(file)).stdout
    found = json.loads(output.rpartition("ANSWERS")[2])
    return dict(zip(CASES, found, strict=True))


MOELORA = {"finetuning_type": "moelora"}
CASES = {
    "typo": {**MOELORA, "moelora_top_kk": 2},
    "typo on the command line": {**MOELORA, "moelora_top_kk": 2, "argv": True},
    "keys without the type": {"moelora_top_k": 2},
    "keys without the type, chat": {"moelora_top_k": 2, "infer": True},
    "unknown preset": {**MOELORA, "moelora_preset": "gr_moe_lorra"},
    "bad value": {**MOELORA, "moelora_num_experts": 4, "moelora_top_k": 5},
    "not a mapping": {**MOELORA, "moelora_aux_losses": "switch_lb", "argv": True},
    "dora": {**MOELORA, "use_dora": True},
    "pissa": {**MOELORA, "pissa_init": True},
    "lora plus": {**MOELORA, "loraplus_lr_ratio": 16.0},
    "muon": {**MOELORA, "use_muon": True},
    "adam mini": {**MOELORA, "use_adam_mini": True},
    "galore": {**MOELORA, "use_galore": True},
    "hyper parallel": {**MOELORA, "use_hyper_parallel": True},
    "megatron": {**MOELORA, "env": {"USE_MEGATRON_BRIDGE": "1"}},
    "ppo": {**MOELORA, "stage": "ppo", "reward_model": "somewhere"},
    "another type": {"finetuning_type": "moe"},
    "mapping": {**MOELORA, "moelora_aux_losses": {"z": 0.1}, "lora_rank": 2, "use_rslora": True},
    "command line": {
        **MOELORA,
        "moelora_aux_losses": '{"z": 1e-3, "switch_lb": 0.1}',
        "moelora_layers_to_transform": "[0]",
        "moelora_exclude_modules": ".*lm_head",
        "moelora_gate_rescale": "exact",
        "argv": True,
    },
    "family": {
        **MOELORA,
        "moelora_preset": "mixlora",
        **{f"moelora_{key}": json.dumps(value) for key, value in FAMILY["mixlora"].items()},
        "moelora_router_modifiers": '{"jitter": 0.01, "capacity": {"tokens": 32}}',
        "moelora_total_rank": "true",
        "argv": True,
    },
    "preset": {**MOELORA, "moelora_preset": "single_lora"},
    "lora": {"finetuning_type": "lora", "lora_target": None},
    "lora with values": {"finetuning_type": "lora", "lora_rank": 4, "lora_dropout": 0.2},
    "chat": {**MOELORA, "moelora_preset": "single_lora", "infer": True},
}


@pytest.mark.parametrize(
    ("case", "error", "said"),
    [
        ("typo", "ConfigError", "moelora_top_kk is not a key here; did you mean moelora_top_k"),
        ("typo on the command line", "ConfigError", "moelora_top_kk is not a key here; did you"),
        (
            "keys without the type",
            "ConfigError",
            "moelora_top_k given with finetuning_type: lora; set finetuning_type: moelora or "
            "remove what begins with moelora_.",
        ),
        ("keys without the type, chat", "ConfigError", "set finetuning_type: moelora"),
        ("unknown preset", "ConfigError", "gr_moe_lora"),
        ("bad value", "ConfigError", "top_k=5 is more than num_experts=4"),
        ("not a mapping", "ConfigError", "moelora_aux_losses='switch_lb' must be a mapping; on a"),
        ("dora", "ConfigError", "use_dora does not go with finetuning_type: moelora"),
        ("pissa", "ConfigError", "moelora_init names the ways to start one"),
        ("lora plus", "ConfigError", "optim_args: lora_plus_ratio=..."),
        ("muon", "ConfigError", "use_muon"),
        ("adam mini", "ConfigError", "use_adam_mini"),
        ("galore", "ValueError", "Cannot use LoRA with GaLore, APOLLO or BAdam together."),
        ("hyper parallel", "ConfigError", "use_hyper_parallel"),
        ("megatron", "ConfigError", "USE_MEGATRON_BRIDGE"),
        ("ppo", "ConfigError", "choose pt, sft, rm, dpo or kto"),
        ("another type", "AssertionError", "Invalid fine-tuning method."),
    ],
)
def test_what_cannot_work_is_refused_before_the_base_is_loaded(answers, case, error, said):
    assert answers[case]["error"] == error, answers[case]
    assert said in answers[case]["message"]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("mapping", {"moelora_aux_losses": {"z": 0.1}, "lora_rank": 2, "lora_alpha": 16}),
        ("mapping", {"finetuning_type": "lora", "lora_dropout": 0.05, "use_rslora": True}),
        ("command line", {"moelora_aux_losses": {"z": 0.001, "switch_lb": 0.1}}),
        ("command line", {"moelora_layers_to_transform": [0], "moelora_gate_rescale": "exact"}),
        ("command line", {"moelora_exclude_modules": ".*lm_head"}),
        ("family", {"moelora_aux_losses": {"z": 0.001}, "moelora_total_rank": True}),
        ("family", {"moelora_router_score_kwargs": {"std": 0.1}, "lora_rank": 16}),
        ("family", {"moelora_router_modifiers": {"jitter": 0.01, "capacity": {"tokens": 32}}}),
        ("preset", {"lora_rank": 80, "lora_alpha": 320, "lora_dropout": 0.05}),
        ("lora", {"lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target": ["all"]}),
        ("lora with values", {"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.2}),
        ("chat", {"lora_rank": 80}),
    ],
)
def test_keys_are_parsed_from_files_and_from_the_command_line(answers, case, expected):
    assert {key: answers[case][key] for key in expected} == expected
