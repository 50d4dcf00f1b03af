"""ms-swift's commands: sft, rlhf, infer, export, with `--tuner_type moelora`."""

from __future__ import annotations

import json
import math
import os
import re
import socket
from pathlib import Path
from string import Template

import pytest
import torch
from host_runs import (
    FAMILY,
    FAMILY_RANK,
    adapter_config,
    adapter_tensors,
    assert_same_tensors,
    assert_trained_adapter,
    assert_trained_preset,
    last_checkpoint,
    losses,
    reload,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from moelora_eval_tasks.prompts import Prompt
from moelora_plugin import PRESETS
from moelora_plugin.training.examples import build_example

HERE = Path(__file__).parent
TEMPLATE = HERE.parents[1] / "moelora_plugin/integrations/templates/ms_swift.yaml"
MODULES = 4  # q_proj and down_proj in two layers
AUX = {"switch_lb": 0.5, "z": 0.01}

OPTIONS = {"moelora_num_experts": 4, "moelora_top_k": 2}
ADAPTER = {"tuner_type": "moelora", "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0}
# With the usual 1e-8, AdamW makes updates of full size from what are rounding differences.
OPTIMIZER = {
    "optimizer": "gradamw",
    "optim_args": "gate_lr=1e-3,damping=1e-4",
    "adam_epsilon": 1e-4,
}
MIXTURE = {**ADAPTER, **OPTIONS, **OPTIMIZER}
# A plain update, which shows how large a gradient is and does not divide it by its own size.
SGD = {"optimizer": "grsgd", "optim_args": "gate_lr=0.1,gate_max_grad_norm=null,damping=0.1"}
WITH_AUX = {**MIXTURE, **SGD, "moelora_aux_losses": AUX}

SFT_COLUMNS = {"prompt": "query", "completion": "response"}
DPO_COLUMNS = {"prompt": "query", "chosen": "response", "rejected": "rejected_response"}


def command_line(settings: dict) -> list[str]:
    words = []
    for key, value in settings.items():
        values = value if isinstance(value, list) else [value]
        texts = [json.dumps(v) if isinstance(v, dict) else str(v) for v in values]
        words += [f"--{key}", *texts]
    return words


def plugin_file(ms_swift) -> Path:
    return ms_swift.moelora / "moelora_plugin/integrations/ms_swift/external_plugin.py"


@pytest.fixture(scope="module")
def settings(model_dir, sft_file, tmp_path_factory):
    """A run's arguments; `output_dir` is a new folder."""

    def arguments(**changes):
        return {
            "model": model_dir,
            "model_type": "llama",
            "torch_dtype": "float32",
            "use_cpu": True,
            "template": "dummy",
            "use_chat_template": False,
            "dataset": sft_file,
            "columns": SFT_COLUMNS,
            "dataset_shuffle": False,
            "train_dataloader_shuffle": False,
            "split_dataset_ratio": 0,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0,
            "max_steps": 4,
            "save_steps": 4,
            "logging_steps": 1,
            "add_version": False,
            "report_to": "none",
            "check_model": False,
            "dataloader_num_workers": 0,
            "output_dir": tmp_path_factory.mktemp("out"),
            **changes,
        }

    return arguments


@pytest.fixture(scope="module")
def train(ms_swift, settings):
    """Run `swift sft` (or another command) and answer with its last checkpoint."""

    def run(*command, host=None, **changes):
        arguments = settings(**changes)
        ms_swift.run("swift", *(command or ("sft",)), *command_line(arguments), **(host or {}))
        return last_checkpoint(arguments["output_dir"])

    return run


def two_processes() -> dict:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"env": {"NPROC_PER_NODE": "2", "MASTER_PORT": str(port)}}


@pytest.fixture(scope="module")
def accumulated(train) -> Path:
    """Two micro-batches of one row to an update, with auxiliary losses."""
    return train(**WITH_AUX, per_device_train_batch_size=1, gradient_accumulation_steps=2)


@pytest.fixture(scope="module")
def by_plugin_file(train, ms_swift) -> Path:
    """Without the hooks: the adapter by `--external_plugins`, its options in `model_kwargs`."""
    return train(
        **ADAPTER,
        **OPTIMIZER,
        model_kwargs={**OPTIONS, "moelora_aux_losses": {"z": 0.0}},
        external_plugins=plugin_file(ms_swift),
        host={"env": {"MOELORA_AUTOLOAD": "0"}},
    )


def test_a_training_leaves_a_whole_adapter(accumulated):
    assert_trained_adapter(accumulated, gate_rescale="sqrt", modules=MODULES)
    config = adapter_config(accumulated)
    assert (config["num_experts"], config["top_k"]) == (4, 2)
    assert (config["r"], config["lora_alpha"]) == (4, 16)  # the preset's, not swift's 8 and 32
    assert config["lora_dropout"] == 0
    assert config["aux_losses"] == AUX
    assert all(math.isfinite(loss) for loss in losses(accumulated))
    for name in ("aux_switch_lb", "aux_z"):
        assert len(losses(accumulated, name)) == 4


def test_two_processes_are_one_with_accumulation(train, accumulated):
    two = train(**WITH_AUX, per_device_train_batch_size=1, ddp_backend="gloo", host=two_processes())
    # Sums over the two rows are taken in another order: 1e-7 of rounding, grown by four updates.
    assert losses(two) == pytest.approx(losses(accumulated), rel=1e-5)
    assert_same_tensors(two, accumulated, rtol=1e-3)


def test_optim_and_the_plugin_file_are_the_same_and_accumulation_is_a_larger_batch(
    train, by_plugin_file
):
    """`optimizer` there, `optim` here; two rows at once there, one after the other here."""
    assert_trained_adapter(by_plugin_file, gate_rescale="sqrt", modules=MODULES)
    accumulated = train(
        **{**MIXTURE, "optimizer": "default", "optim": "gradamw"},
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )
    assert losses(accumulated) == pytest.approx(losses(by_plugin_file), rel=1e-5)
    assert_same_tensors(accumulated, by_plugin_file, rtol=1e-3)


def test_auxiliary_losses_are_those_added_by_hand(train):
    """With rows of two lengths in a batch and accumulation; recomputation is swift's default."""
    changes = {
        **MIXTURE,
        **SGD,
        "gradient_accumulation_steps": 3,
        "num_train_epochs": 2,
        "max_steps": -1,
    }
    ours = train(**changes, moelora_aux_losses=AUX)
    theirs = train(
        **changes,
        gradient_checkpointing=False,  # the routers' hooks must not see a recomputation
        external_plugins=HERE / "ms_swift_by_hand.py",
        host={"env": {"BY_HAND": json.dumps(AUX)}},
    )
    assert_same_tensors(ours, theirs, rtol=1e-4)
    assert losses(theirs) != pytest.approx(losses(ours), rel=1e-3)  # theirs counts it in


def test_the_config_of_moelora_init_trains_and_resumes_exactly(
    ms_swift, model_dir, sft_file, tmp_path
):
    """With the preset's dropout and swift's shuffling."""
    values = {
        "model": str(model_dir),
        "preset": "gr_moe_lora",
        "optimizer": "gradamw",
        "gate_lr": "3.0e-8",
        "data": str(sft_file),
        "output_dir": "output",
        "target_modules": "[q_proj, down_proj]",
        "task": "sst2",
        "model_type": "model_type: llama",
    }
    text = Template(TEMPLATE.read_text()).substitute(values)
    (tmp_path / "ms_swift.yaml").write_text(text)
    changes = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
    }
    command = ["swift", "sft", "ms_swift.yaml", *command_line(changes)]
    log = ms_swift.run(*command, cwd=tmp_path)
    whole = tmp_path / "output" / "checkpoint-6"
    assert_trained_adapter(whole, gate_rescale="sqrt", modules=MODULES)
    config, preset = adapter_config(whole), PRESETS["gr_moe_lora"].overrides
    assert {key: config[key] for key in preset} == preset
    assert_raw_text(log.stdout + log.stderr, model_dir, sft_file)

    half = tmp_path / "output" / "checkpoint-3"
    again = ["--resume_from_checkpoint", str(half), "--output_dir", "resumed"]
    ms_swift.run(*command, *again, cwd=tmp_path)
    resumed = tmp_path / "resumed" / "checkpoint-6"
    assert losses(resumed) == losses(whole)
    assert_same_tensors(resumed, whole)


def assert_raw_text(log: str, model_dir: Path, sft_file: Path) -> None:
    """The row that swift shows in its log has the tokens that our evaluation scores."""
    shown = {
        name: json.loads(re.search(rf"\[{name}\] (\[.*\])", log)[1])
        for name in ("INPUT_IDS", "LABELS_IDS")
    }
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = [json.loads(line) for line in sft_file.read_text().splitlines()]
    examples = [
        build_example(tokenizer, Prompt(row["prompt"], (row["completion"],), 0), 256)
        for row in rows
    ]
    assert (shown["INPUT_IDS"], shown["LABELS_IDS"]) in [
        (example["input_ids"], example["labels"]) for example in examples
    ]


def test_a_continued_adapter_starts_where_it_stood(train, by_plugin_file, model_dir, sft_file):
    continued = train(**MIXTURE, adapters=by_plugin_file)
    model, tokenizer = reload(by_plugin_file, model_dir), AutoTokenizer.from_pretrained(model_dir)
    total = tokens = 0.0
    for line in sft_file.read_text().splitlines()[:2]:
        row = json.loads(line)
        example = build_example(tokenizer, Prompt(row["prompt"], (row["completion"],), 0), 256)
        ids, labels = (torch.tensor([example[key]]) for key in ("input_ids", "labels"))
        count = int((labels != -100).sum())
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * count
        tokens += count
    # Two rows in one padded batch there, one after the other here.
    assert losses(continued)[0] == pytest.approx(total / tokens, rel=1e-5)
    assert losses(continued)[0] < losses(by_plugin_file)[0]


def test_dpo_in_two_processes_starts_from_the_base_as_reference(train, dpo_file):
    changes = {**WITH_AUX, "rlhf_type": "dpo", "dataset": dpo_file, "columns": DPO_COLUMNS}
    changes["per_device_train_batch_size"] = 1
    one = train("rlhf", **changes, gradient_accumulation_steps=2)
    two = train("rlhf", **changes, ddp_backend="gloo", host=two_processes())
    assert_trained_adapter(one, gate_rescale="sqrt", modules=MODULES)
    # New experts change nothing, so policy and reference agree.
    assert losses(one)[0] == pytest.approx(math.log(2), rel=1e-6)
    assert losses(one)[-1] != pytest.approx(math.log(2), rel=1e-4)
    assert len(losses(one, "aux_switch_lb")) == 4
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert_same_tensors(two, one, rtol=1e-3)


@pytest.mark.parametrize("rlhf_type", ["dpo", "kto"])
def test_a_trained_adapter_is_its_own_reference(
    train, by_plugin_file, dpo_file, tmp_path, rlhf_type
):
    """swift's recipe from SFT on: `adapters` goes on training, `ref_adapters` stands still."""
    if rlhf_type == "kto":
        rows = [json.loads(line) for line in dpo_file.read_text().splitlines()]
        dpo_file = tmp_path / "kto.jsonl"
        dpo_file.write_text(
            "".join(json.dumps({**row, "label": n % 2}) + "\n" for n, row in enumerate(rows))
        )
    trained = train(
        "rlhf",
        **MIXTURE,
        rlhf_type=rlhf_type,
        dataset=dpo_file,
        columns=DPO_COLUMNS,
        adapters=by_plugin_file,
        ref_adapters=by_plugin_file,
    )
    # Policy and reference are the same at first: -log(1/2), and for KTO 1 - 1/2.
    start = {"dpo": math.log(2), "kto": 0.5}[rlhf_type]
    assert losses(trained)[0] == pytest.approx(start, rel=1e-6)
    assert len(set(losses(trained))) == len(losses(trained))
    before, after = adapter_tensors(by_plugin_file), adapter_tensors(trained)
    assert after.keys() == before.keys()
    assert not any(torch.equal(after[name], before[name]) for name in before)


# Random models say nothing that a rule could judge: what counts is that rewards differ.
REWARD = """
from swift.rewards import ORM, orms


class Letters(ORM):
    def __call__(self, completions, **kwargs):
        return [sum(map(ord, text)) % 7 / 7 for text in completions]


orms["letters"] = Letters
"""


def test_grpo_goes_on_from_an_adapter_and_stays_near_it(train, ms_swift, by_plugin_file, tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    # Where vLLM is, msgspec is too; swift imports it for GRPO and then uses it with vLLM alone.
    (tmp_path / "msgspec.py").write_text("from dataclasses import field\n")
    trained = train(
        "rlhf",
        **MIXTURE,
        rlhf_type="grpo",
        adapters=by_plugin_file,
        ref_adapters=by_plugin_file,
        external_plugins=tmp_path / "reward.py",
        reward_funcs="letters",
        beta=0.5,
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=8,
        host={"env": {"PYTHONPATH": f"{ms_swift.moelora}{os.pathsep}{tmp_path}"}},
    )
    kl = losses(trained, "kl")
    # The reference is the policy at first, and stays where it was when the policy has moved.
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert all(value > 1e-6 for value in kl[1:])
    assert len(kl) == 4
    before, after = adapter_tensors(by_plugin_file), adapter_tensors(trained)
    assert after.keys() == before.keys()
    assert not any(torch.equal(after[name], before[name]) for name in before)


def test_infer_answers_with_the_unmerged_adapter(
    ms_swift, by_plugin_file, model_dir, sft_file, tmp_path
):
    """Its checkpoint names the plugin file, so that `--adapters` is enough."""
    prompts = [json.loads(line)["prompt"] for line in sft_file.read_text().splitlines()[:4]]
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"query": prompt}) + "\n" for prompt in prompts))
    answers = tmp_path / "answers.jsonl"
    arguments = {
        "adapters": by_plugin_file,
        "use_chat_template": False,
        "val_dataset": asked,
        "val_dataset_shuffle": False,
        "temperature": 0,
        "max_new_tokens": 12,
        "result_path": answers,
    }
    ms_swift.run("swift", "infer", *command_line(arguments), env={"MOELORA_AUTOLOAD": "0"})
    found = [json.loads(line)["response"] for line in answers.read_text().splitlines()]
    expected = generated(reload(by_plugin_file, model_dir), model_dir, prompts)
    assert expected != generated(
        AutoModelForCausalLM.from_pretrained(model_dir), model_dir, prompts
    )
    assert found == expected


def test_the_engine_answers_each_request_with_the_adapter_that_it_names(
    ms_swift, by_plugin_file, accumulated, model_dir, sft_file, tmp_path
):
    """What `swift deploy --adapters a=A b=B` does: one model, an adapter name with each request."""
    prompts = [json.loads(line)["prompt"] for line in sft_file.read_text().splitlines()[:3]]
    adapters = {"a": by_plugin_file, "b": accumulated}
    expected = {
        **{
            name: generated(reload(p, model_dir), model_dir, prompts)
            for name, p in adapters.items()
        },
        None: generated(AutoModelForCausalLM.from_pretrained(model_dir), model_dir, prompts),
    }
    assert len({tuple(answers) for answers in expected.values()}) == 3
    order = [(name, n) for n in range(len(prompts)) for name in ("a", "b", None, "a")]
    given = {
        "model": str(model_dir),
        "adapters": {name: str(path) for name, path in adapters.items()},
        "requests": [(name, prompts[n]) for name, n in order],
    }
    (tmp_path / "requests.json").write_text(json.dumps(given))
    files = [str(tmp_path / name) for name in ("requests.json", "answers.json")]
    ms_swift.run("python", str(HERE / "ms_swift_engine.py"), *files)
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert answers == [expected[name][n] for name, n in order]


def generated(model, model_dir: Path, prompts: list[str]) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    answers = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.eval().generate(**inputs, do_sample=False, max_new_tokens=12)
        answer = tokens[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(answer, skip_special_tokens=True))
    return answers


def test_export_names_our_own(ms_swift, accumulated):
    arguments = {"adapters": accumulated, "merge_lora": True}
    done = ms_swift.run("swift", "export", *command_line(arguments), check=False)
    assert done.returncode != 0
    assert "ExportError: The gates of this adapter follow the input" in done.stderr
    assert "`moelora export ADAPTER --to merged --strategy mean-gate --out DIR`" in done.stderr
    assert not Path(f"{accumulated}-merged").exists()


@pytest.mark.parametrize("preset", FAMILY)
def test_a_preset_of_the_family_trains(train, model_dir, preset):
    """Its options on a command line, as JSON."""
    folder = train(
        tuner_type="moelora",
        lora_rank=FAMILY_RANK,
        **OPTIMIZER,
        max_steps=2,
        save_steps=2,
        moelora_preset=preset,
        **{f"moelora_{key}": value for key, value in FAMILY[preset].items()},
    )
    logged = json.loads((folder / "trainer_state.json").read_text())["log_history"][0]
    assert_trained_preset(folder, preset, {key for key in logged if key.startswith("aux_")})
    reload(folder, model_dir)


def test_plain_lora_does_not_notice_us(train):
    without = train(tuner_type="lora", host={"moelora": False})
    beside = train(tuner_type="lora")
    assert losses(beside) == losses(without)
    assert adapter_config(beside)["peft_type"] == "LORA"
    assert_same_tensors(beside, without)


CONFIGS = {
    "nothing set": ({}, {"r": 4, "lora_alpha": 16, "lora_dropout": 0.05, "num_experts": 20}),
    "swift's own defaults, but set": (
        {"lora_rank": 8, "lora_alpha": 32.0, "lora_bias": "none", "use_rslora": True},
        {"r": 8, "lora_alpha": 32, "use_rslora": True, "num_experts": 20},
    ),
    "a preset, and a word that wins": (
        {"moelora_preset": "single_lora", "lora_alpha": 80},
        {"num_experts": 1, "top_k": 1, "r": 80, "lora_alpha": 80},
    ),
    "a preset that lists its targets": ({"moelora_preset": "llava_mole"}, {"by_preset": True}),
    "a preset for all linears": ({"moelora_preset": "goat"}, {"by_preset": False}),
    "targets that win over the preset's": (
        {"moelora_preset": "llava_mole", "target_modules": "all-linear"},
        {"by_preset": False},
    ),
    "lists and mappings": (
        {
            "moelora_layers_to_transform": [0, 1],
            "moelora_exclude_modules": "lm_head",
            "moelora_aux_losses": {"z": 1e-3},
        },
        {
            "layers_to_transform": [0, 1],
            "exclude_modules": ["lm_head"],
            "aux_losses": {"z": 1e-3},
        },
    ),
    "in model_kwargs": (
        {"model_kwargs": {"moelora_num_experts": 12, "moelora_exclude_modules": "lm_.*"}},
        {"num_experts": 12, "exclude_modules": "lm_.*"},
    ),
}
REFUSALS = {
    "options without the tuner": (
        {"tuner_type": "lora", "moelora_top_k": 2},
        "moelora_top_k goes with tuner_type moelora, not with lora",
    ),
    "an unknown option": (
        {"model_kwargs": {"moelora_num_expert": 4}},
        "moelora_num_expert is not a key here; did you mean moelora_num_experts",
    ),
    "a value out of range": (
        {"moelora_num_experts": 4},
        "top_k=10 is more than num_experts=4",
    ),
    "not a mapping": (
        {"moelora_aux_losses": "switch_lb=1"},
        "moelora_aux_losses='switch_lb=1' must be a mapping; on a command line that is JSON",
    ),
    "another LoRA": ({"use_dora": True}, "use_dora does not go with tuner_type moelora: remove it"),
    "another initialisation": ({"init_weights": "pissa"}, "remove it, or use moelora_init"),
    "groups of their own": (
        {"optim": "gradamw", "lorap_lr_ratio": 4},
        "lorap_lr_ratio does not go with moelora's optimizers: use optim_args lora_plus_ratio",
    ),
}


@pytest.fixture(scope="module")
def parsed(ms_swift, settings, accumulated, tmp_path_factory):
    """What swift's parser says to every case, in one start."""
    cases = [
        {"argv": command_line(settings(**{"tuner_type": "moelora", **changes}))}
        for changes, _ in [*CONFIGS.values(), *REFUSALS.values()]
    ]
    keywords = {k: str(v) if isinstance(v, Path) else v for k, v in settings().items()}
    python = {"keywords": {**keywords, "dataset": [keywords["dataset"]], "tuner_type": "moelora"}}
    continued = {"adapters": accumulated, "tuner_type": "moelora"}
    cases += [
        python,
        {"argv": command_line(settings(**continued, moelora_preset="gr_exact"))},
        {"argv": command_line(settings(**continued, **OPTIONS, lora_rank=4))},
    ]
    folder = tmp_path_factory.mktemp("cases")
    (folder / "cases.json").write_text(json.dumps(cases))
    script = str(HERE / "ms_swift_arguments.py")
    ms_swift.run("python", script, str(folder / "cases.json"), str(folder / "answers.json"))
    names = [*CONFIGS, *REFUSALS, "from Python", "another adapter", "the same adapter"]
    return dict(zip(names, json.loads((folder / "answers.json").read_text()), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_not_set_comes_from_the_preset(parsed, name):
    expected = CONFIGS[name][1]
    assert {key: parsed[name].get(key) for key in expected} == expected, parsed[name]


def test_keywords_from_python_code_all_count_as_set(parsed):
    assert (parsed["from Python"]["r"], parsed["from Python"]["lora_alpha"]) == (8, 32)


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused(parsed, name):
    assert parsed[name].get("error") == "ConfigError", parsed[name]
    assert REFUSALS[name][1] in parsed[name]["message"]


def test_two_adapters_are_not_put_into_one_another(ms_swift, by_plugin_file, accumulated, tmp_path):
    (tmp_path / "asked.jsonl").write_text('{"query": "Sentence"}\n')
    arguments = {
        "adapters": [by_plugin_file, accumulated],
        "val_dataset": tmp_path / "asked.jsonl",
        "result_path": tmp_path / "answers.jsonl",
    }
    done = ms_swift.run("swift", "infer", *command_line(arguments), check=False)
    assert done.returncode != 0
    assert f"ConfigError: adapters names a second adapter, {accumulated}" in done.stderr


def test_a_continued_adapter_must_be_the_one_that_is_asked_for(parsed):
    """Before the base is there."""
    assert "error" not in parsed["the same adapter"]
    assert "moelora_gate_rescale is 'exact', but" in parsed["another adapter"]["message"]


# Of an adapter with `OPTIONS` on q_proj and down_proj: what a run that goes on from it may say, and
# what it may not. All of it works without the hooks too.
CONTINUED = [
    ({}, None),
    ({"model_kwargs": OPTIONS, "lora_rank": 4, "use_rslora": False}, None),
    ({"target_modules": ["self_attn.q_proj", "mlp.down_proj"]}, None),
    ({"target_regex": ".*(q_proj|down_proj)"}, None),
    ({"model_kwargs": {**OPTIONS, "moelora_top_k": 1}}, "moelora_top_k is 1, but {} 2"),
    ({"lora_rank": 8}, "lora_rank is 8, but {} 4"),
    ({"lora_alpha": 32}, "lora_alpha is 32.0, but {} 16"),
    ({"lora_dropout": 0.3}, "lora_dropout is 0.3, but {} 0.0"),
    ({"use_rslora": True}, "use_rslora is True, but {} False"),
    ({"lora_bias": "all"}, "lora_bias is 'all', but {} 'none'"),
    (
        {"target_modules": ["q_proj"]},
        "target_modules is ['q_proj'], but {} ['down_proj', 'q_proj']",
    ),
    ({"target_modules": "all-linear"}, "target_modules is 'all-linear', but {} ['down_proj'"),
    ({"target_regex": ".*q_proj"}, "target_regex is '.*q_proj', but {} ['down_proj', 'q_proj']"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head'], but {} None"),
    ({"tuner_type": "lora"}, "holds a mixture of LoRA experts; set tuner_type moelora to train it"),
    ({"tuner_type": "full"}, "holds a mixture of LoRA experts; set tuner_type moelora to train it"),
]


@pytest.mark.parametrize("hooks", ["1", "0"])
@pytest.mark.parametrize("key", ["adapters", "resume_from_checkpoint"])
def test_a_continued_adapter_keeps_its_configuration(
    ms_swift, settings, by_plugin_file, tmp_path, key, hooks
):
    own = {} if hooks == "1" else {"external_plugins": plugin_file(ms_swift)}
    own |= {"tuner_type": "moelora", key: by_plugin_file}
    cases = [
        {"argv": command_line(settings(**{**own, **change})), "adapts": True}
        for change, _ in CONTINUED
    ]
    files = [str(tmp_path / name) for name in ("cases.json", "answers.json")]
    Path(files[0]).write_text(json.dumps(cases))
    script = str(HERE / "ms_swift_arguments.py")
    ms_swift.run("python", script, *files, env={"MOELORA_AUTOLOAD": hooks})
    where = f"the adapter in {by_plugin_file} was trained with"
    for (change, said), answer in zip(
        CONTINUED, json.loads(Path(files[1]).read_text()), strict=True
    ):
        if said is None:
            assert "error" not in answer, (change, answer)
        else:
            assert answer.get("error") == "ConfigError", (change, answer)
            assert said.format(where) in answer["message"], (change, answer)


def test_without_the_hooks_an_option_is_told_where_to_go(ms_swift, settings):
    options = {"external_plugins": plugin_file(ms_swift), "moelora_num_experts": 4}
    arguments = settings(tuner_type="moelora", **options)
    off = {"MOELORA_AUTOLOAD": "0"}
    done = ms_swift.run("swift", "sft", *command_line(arguments), env=off, check=False)
    assert done.returncode != 0
    assert "ConfigError: --moelora_num_experts is not known to swift" in done.stderr
