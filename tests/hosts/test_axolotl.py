"""axolotl: its own commands on a tiny model, with numbers as the judges."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from string import Template

import pytest
import torch
import yaml
from datasets import load_from_disk
from host_runs import (
    FAMILY,
    FAMILY_RANK,
    adapter_tensors,
    assert_same_tensors,
    assert_trained_adapter,
    assert_trained_preset,
    last_checkpoint,
    losses,
    reload,
    reload_logits,
)
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

PLUGIN = "moelora_plugin.integrations.axolotl.MoeLoraPlugin"
TEMPLATE = Path(__file__).parents[2] / "moelora_plugin/integrations/templates/axolotl.yaml"
AUX = {"switch_lb": "1e-2", "z": 0.02}  # YAML 1.1 takes 1e-2 for text
MODULES = 4  # q_proj and down_proj of two layers

# One process per rank on the CPU: axolotl gives each rank an accelerator unless it is told what
# memory there is, and accelerate looks for one unless it is told not to.
ON_CPU = {"max_memory": {"cpu": "4GiB"}}
TWO = ("--launcher", "torchrun", "--", "--nproc_per_node=2")
USE_CPU = {"ACCELERATE_USE_CPU": "true"}
NO_ENTRY_POINT = {"MOELORA_AUTOLOAD": "0"}
ONE = ("--launcher", "python")  # without accelerate's launcher: a start less

# The auxiliary losses added to the loss itself, token by token over what is no padding.
BY_HAND = """
from axolotl.integrations.base import BasePlugin

COEFFICIENTS = {"switch_lb": 1e-2, "z": 0.02}


def by_hand(name, routing, real):
    tokens = [t for t in range(len(real)) if real[t]]
    if name == "z":
        return sum(routing.logits[t].exp().sum().log() ** 2 for t in tokens) / len(tokens)
    total = 0.0
    for e in range(routing.probs.shape[-1]):
        share = sum(float(routing.weights[t, e] > 0) for t in tokens) / len(tokens)
        total = total + share * sum(routing.probs[t, e] for t in tokens) / len(tokens)
    return routing.probs.shape[-1] * total


class AddedByHand(BasePlugin):
    def post_trainer_create(self, cfg, trainer):
        from moelora_plugin.model import moelora_layers

        routings = {}
        for name, layer in moelora_layers(trainer.model).items():
            layer.moelora_router["default"].register_forward_hook(
                lambda module, args, routing, name=name: routings.__setitem__(name, routing)
            )
        compute_loss = trainer.compute_loss

        def with_summands(model, inputs, *args, **kwargs):
            real = inputs["attention_mask"].bool().flatten()
            assert not real.all()
            loss = compute_loss(model, inputs, *args, **kwargs)
            summands = [
                coefficient * by_hand(name, routing, real)
                for name, coefficient in COEFFICIENTS.items()
                for routing in routings.values()
            ]
            return loss + sum(summands) / len(routings)

        trainer.compute_loss = with_summands
"""

# What each document was given, by its tokens: in packed rows, positions start anew with each.
DECISIONS = """
import torch
from axolotl.integrations.base import BasePlugin


class Decisions(BasePlugin):
    def post_trainer_create(self, cfg, trainer):
        from moelora_plugin.model import moelora_layers

        found, last = {}, {}
        for name, layer in moelora_layers(trainer.model).items():
            layer.moelora_router["default"].register_forward_hook(
                lambda module, args, routing, name=name: last.__setitem__(name, routing.weights)
            )
        compute_loss = trainer.compute_loss

        def noted(model, inputs, *args, **kwargs):
            ids, positions = inputs["input_ids"], inputs.get("position_ids")
            mask = inputs.get("attention_mask")
            assert (mask is None) == bool(cfg.sample_packing)
            documents = []
            for row in range(len(ids)):
                if not cfg.sample_packing:
                    documents.append(ids[row][mask[row].bool()])
                    continue
                starts = (positions[row] == 0).nonzero().flatten().tolist()
                ends = [*starts[1:], ids.shape[1]]
                documents += [ids[row][a:b] for a, b in zip(starts, ends)]
            loss = compute_loss(model, inputs, *args, **kwargs)
            for name, weights in last.items():
                assert len(weights) == len(documents), (name, len(weights), len(documents))
                for document, given in zip(documents, weights):
                    found[(name, tuple(document.tolist()))] = given.detach().clone()
            torch.save(found, f"{cfg.output_dir}-decisions.pt")
            return loss

        trainer.compute_loss = noted
"""

# Random models say nothing that a rule could judge: what counts is that rewards differ.
REWARDS = """
def letters(completions, **_):
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


def prompts(cfg, *_, **__):
    return lambda row, tokenizer=None: {"prompt": row["prompt"]}, {"remove_columns": ["completion"]}
"""

# Each setting and what the answer must name. One process tries them all.
REFUSED = [
    ({"load_in_8bit": True}, "load_in_8bit"),
    ({"load_in_4bit": True}, "load_in_4bit"),
    ({"peft_use_dora": True}, "peft_use_dora"),
    ({"lora_qkv_kernel": True}, "lora_qkv_kernel"),
    ({"lora_mlp_kernel": True}, "lora_mlp_kernel"),
    ({"relora": True, "jagged_restart_steps": 2}, "relora"),
    ({"lora_rank_pattern": {"q_proj": 8}}, "lora_rank_pattern"),
    ({"loraplus_lr_ratio": 4.0}, "lora_plus_ratio"),
    ({"lr_groups": [{"name": "a", "modules": ["q_proj"], "lr": 1e-3}]}, "gate_lr"),
    ({"optim_args": {"dampnig": 1e-3}}, "'damping'"),
    ({"optim_args": {"eps": 1e-3}}, "adam_epsilon"),
    ({"moelora": {"num_exprts": 3}}, "'num_experts'"),
    ({"moelora": {"preset": "gr_moe"}}, "'gr_moe_lora'"),
    ({"moelora": {"num_experts": 4, "top_k": 5}}, "top_k=5"),
    ({"moelora": {"num_experts": 4, "top_k": 2, "r": 8}}, "lora_r and moelora.r name different"),
    ({"moelora": ["num_experts"]}, "must map names to values"),
    ({"adapter": "lora"}, "needs adapter: moelora"),
    ({"sample_packing": True, "moelora": {"aux_losses": {"z": 0.1}}}, "sample_packing"),
    (
        {"sample_packing": True, "moelora": {"aux_losses": {"switch_lb": 0.01}}},
        "moelora.aux_losses (switch_lb)",
    ),
    (
        {"sample_packing": True, "moelora": {"router_modifiers": {"balance_bias": 0.001}}},
        "moelora.router_modifiers (balance_bias)",
    ),
    (
        {
            "sample_packing": True,
            "moelora": {"router_input": "task", "router_score": "embedding"},
        },
        "one id for moelora.router_input task",
    ),
    (
        {
            "sample_packing": True,
            "pretrain_multipack_attn": False,
            "moelora": {"router_input": "prompt"},
        },
        "pretrain_multipack_attn: false does not tell where a packed sequence ends",
    ),
    ({"moelora": {"router_kwargs": "renormalize"}}, "router_kwargs"),
    ({"rl": "dpo", "lora_model_dir": "somewhere"}, "lora_model_dir"),
    ({"inference": True}, "lora_model_dir"),
]


class Runs:
    """Writes configs into one folder and runs axolotl's commands on them."""

    def __init__(self, host, model_dir: Path, sft_file: Path, dpo_file: Path, folder: Path):
        self.host, self.model_dir, self.folder = host, model_dir, folder
        self.sft_file, self.dpo_file = sft_file, dpo_file

    def config(self, name: str, moelora=None, **changes) -> Path:
        content = {
            "base_model": str(self.model_dir),
            "plugins": [PLUGIN],
            "adapter": "moelora",
            "lora_r": 2,
            "lora_alpha": 4,
            "lora_dropout": 0.0,
            "lora_target_modules": ["q_proj", "down_proj"],
            "moelora": {"num_experts": 4, "top_k": 2, **(moelora or {})},
            "optimizer": "gradamw",
            "optim_args": {"gate_lr": 1e-3, "damping": 1e-6},
            "datasets": [
                {
                    "path": str(self.sft_file),
                    "ds_type": "json",
                    "type": {
                        "field_instruction": "prompt",
                        "field_output": "completion",
                        "format": "{instruction}",
                        "no_input_format": "{instruction}",
                    },
                }
            ],
            "dataset_prepared_path": str(self.folder / "prepared"),
            "val_set_size": 0,
            "sequence_len": 128,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "num_epochs": 4,
            "max_steps": 6,
            "save_steps": 3,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "lr_scheduler": "constant",
            "bf16": False,
            "tf32": False,
            "gradient_checkpointing": False,
            "seed": 7,
            "output_dir": str(self.folder / name),
            **changes,
        }
        file = self.folder / f"{name}.yaml"
        content = {key: value for key, value in content.items() if value is not None}
        file.write_text(yaml.safe_dump(content))
        return file

    def train(self, name: str, *arguments: str, env=None, installed=True, **changes) -> Path:
        """Train and return the output folder."""
        file = self.config(name, **changes)
        self.host.run(
            "axolotl",
            "train",
            str(file),
            *(arguments or ONE),
            env=env,
            moelora=installed,
            cwd=self.folder,
        )
        return self.folder / name

    def dpo(self, name: str, **changes) -> Path:
        fields = {f"field_{key}": key for key in ("prompt", "chosen", "rejected")}
        rows = {"path": str(self.dpo_file), "ds_type": "json", "split": "train", "type": fields}
        return self.train(
            name,
            rl="dpo",
            datasets=[rows],
            max_steps=4,
            save_steps=2,
            env=NO_ENTRY_POINT,
            **changes,
        )


@pytest.fixture(scope="module")
def runs(axolotl, model_dir, sft_file, dpo_file, tmp_path_factory):
    return Runs(axolotl, model_dir, sft_file, dpo_file, tmp_path_factory.mktemp("axolotl-runs"))


@pytest.fixture(scope="module")
def plain(runs):
    """By the default launcher, without auxiliary losses, with dropout."""
    return runs.train("plain", "--launcher", "accelerate", lora_dropout=0.1)


@pytest.fixture(scope="module")
def accumulated(runs):
    """With auxiliary losses, two micro-batches an update."""
    return runs.train("accumulated", moelora={"aux_losses": AUX}, gradient_accumulation_steps=2)


@pytest.fixture(scope="module")
def preferred(runs):
    """DPO."""
    return runs.dpo("preferred", lora_dropout=0.1)


def test_trains_and_saves_a_whole_adapter(plain, model_dir):
    assert len(losses(plain)) == 6
    assert all(math.isfinite(loss) for loss in losses(plain))
    assert_trained_adapter(plain, "sqrt", MODULES)
    assert reload_logits(plain, model_dir).isfinite().all()


def test_resumes_exactly(runs, plain):
    resumed = runs.train(
        "resumed", lora_dropout=0.1, resume_from_checkpoint=str(plain / "checkpoint-3")
    )
    assert not (resumed / "checkpoint-3").exists()  # it did not start over
    assert losses(resumed) == losses(plain)
    assert_same_tensors(resumed, plain)


def test_a_resumed_run_asks_for_the_adapter_of_its_checkpoint(runs, plain):
    checkpoint = str(plain / "checkpoint-3")
    file = runs.config("other", moelora={"top_k": 1}, resume_from_checkpoint=checkpoint)
    done = runs.host.run("axolotl", "train", str(file), *ONE, cwd=runs.folder, check=False)
    assert done.returncode != 0
    assert f"top_k is 1 in this run, and the checkpoint in {checkpoint} was" in done.stderr


def test_two_processes_train_as_one_that_accumulates(runs, accumulated):
    # The same rows meet in each update. Checkpointing recomputes the layers; the workers find the
    # adapter through the plugin alone.
    two = runs.train(
        "two",
        *TWO,
        moelora={"aux_losses": AUX},
        gradient_checkpointing=True,
        env={**USE_CPU, **NO_ENTRY_POINT},
        **ON_CPU,
    )
    # fp32 gradients summed by gloo and by autograd, in another order.
    assert losses(two) == pytest.approx(losses(accumulated), rel=1e-5)
    assert_same_tensors(two, accumulated, rtol=1e-4)


def test_aux_losses_train_as_if_added_to_the_loss_by_hand(runs, accumulated):
    (runs.folder / "by_hand.py").write_text(BY_HAND)
    by_hand = runs.train(
        "by_hand",
        plugins=[PLUGIN, "by_hand.AddedByHand"],
        gradient_accumulation_steps=2,
        env={"PYTHONPATH": f"{runs.host.moelora}{os.pathsep}{runs.folder}"},
    )
    # Sums over tokens in another order, and Adam divides small gradients by themselves.
    assert_same_tensors(by_hand, accumulated, rtol=1e-3)
    balance, z = losses(accumulated, "aux_switch_lb"), losses(accumulated, "aux_z")
    assert len(balance) == len(z) == 6
    assert all(1.9 < value < 4.0 for value in balance)  # top_k where balanced, num_experts at most
    added = torch.tensor(losses(by_hand)) - torch.tensor(losses(accumulated))
    logged = 1e-2 * torch.tensor(balance) + 0.02 * torch.tensor(z)
    # What is logged is the last micro-batch's, what was added the mean of two.
    torch.testing.assert_close(added, logged, rtol=0.1, atol=0)


@pytest.mark.parametrize("router_input", ["sequence", "prompt"])
def test_a_packed_document_is_decided_about_as_it_is_alone(runs, router_input):
    (runs.folder / "decisions.py").write_text(DECISIONS)
    found = {}
    for packs in (True, False):
        output = runs.train(
            f"{router_input}_{packs}",
            plugins=[PLUGIN, "decisions.Decisions"],
            moelora={"router_input": router_input},
            sample_packing=packs,
            attn_implementation="sdpa",  # so that documents do not see each other
            # Nothing moves, so that it does not matter when a document is met.
            learning_rate=0.0,
            optim_args={"gate_lr": 0.0},
            num_epochs=1,
            max_steps=None,
            save_steps=None,
            micro_batch_size=1 if packs else 2,
            env={"PYTHONPATH": f"{runs.host.moelora}{os.pathsep}{runs.folder}"},
        )
        found[packs] = torch.load(f"{output}-decisions.pt")
    alone, packed = found[False], found[True]
    assert len({document for _, document in alone}) == 16  # all rows
    met = alone.keys() & packed.keys()
    assert len({document for _, document in met}) >= 8  # of the rest axolotl fills no row
    assert len({tuple(weights.tolist()) for weights in alone.values()}) > 8
    for key in met:  # attention over a row and over a document, in another order
        torch.testing.assert_close(packed[key], alone[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router_input", ["token", "sequence"])
def test_a_packed_batch_has_the_loss_of_the_padded_one(runs, router_input):
    found = []
    for packs in (True, False):
        output = runs.train(
            f"{router_input}_loss_{packs}",
            moelora={"router_input": router_input},
            sample_packing=packs,
            attn_implementation="sdpa",
            sequence_len=1024,  # all rows in one
            micro_batch_size=1 if packs else 16,
            optim_args={"gate_lr": 1e-3, "damping": 1e-2},
            num_epochs=3,
            max_steps=3,
        )
        found.append(losses(output))
    assert len(set(found[0])) == 3
    # fp32 sums in another order, and two updates that go on from them.
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_continues_from_an_adapter(runs, accumulated, model_dir):
    # One update over all sixteen rows, so that the logged loss is theirs before any step.
    continued = runs.train(
        "continued",
        lora_model_dir=str(accumulated),
        moelora={"aux_losses": AUX},
        gradient_accumulation_steps=8,
        max_steps=1,
        save_steps=1,
    )
    model, tokenizer = reload(accumulated, model_dir), AutoTokenizer.from_pretrained(model_dir)
    batches = [json.loads(line) for line in runs.sft_file.read_text().splitlines()]
    rows = []
    for row in batches:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            rows.append((float(model(ids, labels=labels).loss), len(answer)))
    assert len({length for _, length in rows}) == 1  # else rows would weigh differently
    expected = sum(loss for loss, _ in rows) / len(rows)
    # fp32 logits of padded and unpadded batches.
    assert losses(continued) == pytest.approx([expected], rel=1e-5)
    before, after = adapter_tensors(accumulated), adapter_tensors(continued)
    assert any(not torch.equal(before[name], after[name]) for name in before)


# Of the adapter with two auxiliary losses: what a run that goes on from it may say, and may not.
CONTINUED = [
    ({"moelora": {"num_experts": 4, "top_k": 2}}, None),
    ({"lora_target_modules": ".*(q_proj|down_proj)"}, None),
    ({"peft_use_rslora": False, "lora_dropout": None}, None),
    ({"lora_r": 8}, "lora_r is 8, but {} 2"),
    ({"lora_alpha": 8}, "lora_alpha is 8, but {} 4"),
    ({"lora_dropout": 0.2}, "lora_dropout is 0.2, but {} 0.0"),
    ({"lora_target_modules": ["q_proj"]}, "lora_target_modules is ['q_proj'], but {} ['down_proj'"),
    (
        {"lora_target_modules": None, "lora_target_linear": True},
        "lora_target_linear is 'all-linear', but {} ['down_proj', 'q_proj']",
    ),
    ({"lora_modules_to_save": ["lm_head"]}, "lora_modules_to_save is ['lm_head'], but {} None"),
    ({"peft_layers_to_transform": [0]}, "peft_layers_to_transform is [0], but {} None"),
    ({"peft_use_rslora": True}, "peft_use_rslora is True, but {} False"),
    ({"moelora": {"top_k": 1}}, "moelora.top_k is 1, but {} 2"),
    ({"moelora": {"aux_losses": {"z": 0.1}}}, "moelora.aux_losses is {{'z': 0.1}}, but {} "),
    ({"moelora": {"preset": "gr_exact"}}, "is 'exact', but {} 'sqrt'"),
    ({"inference": True, "lora_r": 8}, "lora_r is 8, but {} 2"),
    (
        {"adapter": "lora", "moelora": None, "lora_r": 8},
        "holds a mixture of LoRA experts; set adapter: moelora, and plugins to a list with "
        "moelora_plugin.integrations.axolotl.MoeLoraPlugin.",
    ),
]


def test_a_continued_adapter_keeps_its_configuration(runs, accumulated):
    base = yaml.safe_load(runs.config("other", lora_model_dir=str(accumulated)).read_text())
    del base["moelora"]
    cases = [{**base, **change} for change, _ in CONTINUED]
    (runs.folder / "continued.json").write_text(json.dumps(cases))
    script = str(Path(__file__).with_name("axolotl_refusals.py"))
    files = ("continued.json", "continued_answers.json")
    runs.host.run("python", script, *files, "adapts", cwd=runs.folder)
    answers = json.loads((runs.folder / files[1]).read_text())
    where = f"the adapter in {accumulated} was trained with"
    for (change, said), answer in zip(CONTINUED, answers, strict=True):
        if said is None:
            assert answer == "accepted", (change, answer)
        else:
            assert said.format(where) in answer, (change, answer)


def test_dpo_trains_and_resumes_exactly(runs, preferred, model_dir):
    assert losses(preferred)[0] == pytest.approx(math.log(2), rel=1e-6)  # B is zero at first
    assert len(set(losses(preferred))) == 4
    assert_trained_adapter(preferred, "sqrt", MODULES)
    assert reload_logits(preferred, model_dir).isfinite().all()
    resumed = runs.dpo(
        "preferred_resumed",
        lora_dropout=0.1,
        resume_from_checkpoint=str(preferred / "checkpoint-2"),
    )
    assert not (resumed / "checkpoint-2").exists()
    assert losses(resumed) == losses(preferred)
    assert_same_tensors(resumed, preferred)


def test_kto_starts_from_the_base_as_reference(runs, tmp_path):
    rows = [json.loads(line) for line in runs.sft_file.read_text().splitlines()]
    rows = [json.dumps({**row, "label": n % 2 == 0}) + "\n" for n, row in enumerate(rows)]
    (tmp_path / "kto.jsonl").write_text("".join(rows))
    fields = {"field_prompt": "prompt", "field_completion": "completion", "field_label": "label"}
    data = {"path": f"{tmp_path}/kto.jsonl", "ds_type": "json", "split": "train", "type": fields}
    trained = runs.train("kto", rl="kto", datasets=[data], remove_unused_columns=False)
    assert losses(trained)[0] == pytest.approx(0.5, rel=1e-6)
    assert len(set(losses(trained))) == 6
    assert_trained_adapter(trained, "sqrt", MODULES)


def test_grpo_goes_on_from_an_adapter_and_stays_near_it(runs, accumulated):
    (runs.folder / "rewards.py").write_text(REWARDS)
    data = {"path": str(runs.sft_file), "ds_type": "json", "split": "train"}
    trained = runs.train(
        "grpo",
        rl="grpo",
        datasets=[{**data, "type": "rewards.prompts"}],
        lora_model_dir=str(accumulated),
        moelora={"aux_losses": AUX},
        micro_batch_size=4,
        max_steps=4,
        trl={
            "beta": 0.5,
            "use_vllm": False,
            "num_generations": 4,
            "max_completion_length": 8,
            "reward_funcs": ["rewards.letters"],
        },
        env={"PYTHONPATH": f"{runs.host.moelora}{os.pathsep}{runs.folder}"},
    )
    kl = losses(trained, "kl")
    # The reference is the policy at first, and stays where it was when the policy has moved.
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert len(kl) == 4
    assert all(value > 1e-7 for value in kl[1:])
    before, after = adapter_tensors(accumulated), adapter_tensors(trained)
    assert after.keys() == before.keys()
    assert not any(torch.equal(after[name], before[name]) for name in before)


def test_inference_answers_with_the_adapter_unmerged(runs, plain, model_dir, tmp_path):
    # axolotl samples; with logits a hundred times as far apart the first token always wins.
    sharp = tmp_path / "sharp"
    shutil.copytree(model_dir, sharp)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.lm_head.weight.data *= 100
    model.save_pretrained(sharp)
    prompt = "Sentence: the film is number 3. The correct answer is"
    done = runs.host.run(
        "axolotl",
        "inference",
        str(runs.config("inference", base_model=str(sharp), lora_dropout=0.1)),
        *ONE,
        "--lora-model-dir",
        str(plain),
        cwd=runs.folder,
        stdin=prompt,
    )
    adapted, tokenizer = reload(plain, sharp), AutoTokenizer.from_pretrained(sharp)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    greedy = {"do_sample": False, "repetition_penalty": 1.1, "max_new_tokens": 12}

    def answer() -> str:
        tokens = adapted.generate(input_ids=ids, attention_mask=ids.ne(-1), **greedy)
        return tokenizer.decode(tokens[0])

    with adapted.disable_adapter():
        assert answer() not in done.stdout
    assert answer() in done.stdout


def test_merge_names_the_export(runs, plain):
    done = runs.host.run(
        "axolotl", "merge-lora", str(runs.folder / "plain.yaml"), cwd=runs.folder, check=False
    )
    assert done.returncode != 0
    assert f"`moelora export {plain} --to merged" in done.stderr
    assert not (plain / "merged").exists()
    # Under another name, and without the plugin, axolotl would write the base as the merged model.
    content = yaml.safe_load((runs.folder / "plain.yaml").read_text())
    for key in ("plugins", "moelora", "optimizer", "optim_args"):
        del content[key]
    (runs.folder / "as_lora.yaml").write_text(yaml.safe_dump({**content, "adapter": "lora"}))
    done = runs.host.run("axolotl", "merge-lora", "as_lora.yaml", cwd=runs.folder, check=False)
    assert done.returncode != 0
    assert "ExportError: axolotl's merge-lora reads plain LoRA files" in done.stderr
    assert not (plain / "merged").exists()


def test_refuses_in_a_sentence_what_does_not_fit(runs):
    base = yaml.safe_load(runs.config("refused").read_text())
    cases = [{**base, **change} for change in (*(change for change, _ in REFUSED), {})]
    (runs.folder / "cases.json").write_text(json.dumps(cases))
    script = str(Path(__file__).with_name("axolotl_refusals.py"))
    runs.host.run("python", script, "cases.json", "answers.json", cwd=runs.folder)
    *answers, untouched = json.loads((runs.folder / "answers.json").read_text())
    for (change, named), answer in zip(REFUSED, answers, strict=True):
        assert answer.startswith("1 validation error"), (change, answer)
        assert named in answer, (change, answer)
    assert untouched == "accepted"


@pytest.mark.parametrize("preset", FAMILY)
def test_a_preset_of_the_family_trains(runs, model_dir, preset):
    folder = runs.train(
        f"family-{preset}",
        lora_r=FAMILY_RANK,
        lora_alpha=None,
        lora_dropout=None,
        lora_target_modules=None,
        moelora={"top_k": None, "preset": preset, **FAMILY[preset]},
        max_steps=2,
        save_steps=2,
    )
    state = json.loads((last_checkpoint(folder) / "trainer_state.json").read_text())
    logged = {key for key in state["log_history"][0] if key.startswith("aux_")}
    assert_trained_preset(folder, preset, logged)
    reload(folder, model_dir)


def test_plain_lora_is_untouched(runs, model_dir):
    # axolotl initialises LoRA without a seed: both runs go on from one adapter.
    start = runs.folder / "lora_start"
    torch.manual_seed(0)
    modules = ["q_proj", "down_proj"]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=modules, task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(), config).save_pretrained(start)
    words = {
        "plugins": None,
        "adapter": "lora",
        "optimizer": "adamw_torch",
        "optim_args": None,
        "lora_model_dir": str(start),
        "lora_dropout": 0.1,
    }
    folders = []
    for installed in (False, True):
        name = f"lora_{installed}"
        file = runs.config(name, **words)
        content = yaml.safe_load(file.read_text())
        del content["moelora"]
        file.write_text(yaml.safe_dump(content))
        runs.host.run("axolotl", "train", str(file), *ONE, moelora=installed, cwd=runs.folder)
        folders.append(runs.folder / name)
    without, with_moelora = folders
    assert len(losses(without)) == 6
    assert losses(with_moelora) == losses(without)
    assert_same_tensors(with_moelora, without)


def test_the_template_trains_on_the_prompt_and_the_completion_as_they_are(runs):
    folder = runs.folder / "template"
    folder.mkdir()
    text = Template(TEMPLATE.read_text()).substitute(
        model=runs.model_dir,
        preset="gr_moe_lora",
        optimizer="gradamw",
        gate_lr="3.0e-8",
        data=runs.sft_file,
        output_dir="output",
        target_modules="[q_proj, down_proj]",
        task="sst2",
    )
    (folder / "axolotl.yaml").write_text(text)
    runs.host.run("axolotl", "train", "axolotl.yaml", *ONE, "--max-steps", "2", cwd=folder)
    assert_trained_adapter(folder / "output", "sqrt", MODULES)

    tokenizer = AutoTokenizer.from_pretrained(runs.model_dir)
    expected = set()
    for line in runs.sft_file.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        expected.add((tuple(prompt), (*answer, tokenizer.eos_token_id)))
    found = set()
    (state,) = (folder / "output" / "prepared").glob("*/state.json")
    for row in load_from_disk(str(state.parent)):
        ignored = row["labels"].count(-100)
        assert row["labels"][ignored:] == row["input_ids"][ignored:]
        found.add((tuple(row["input_ids"][:ignored]), tuple(row["input_ids"][ignored:])))
    assert found == expected
