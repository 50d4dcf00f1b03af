"""A host's word for all linears is our own choice, on bases that have more than plain linears."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_llama, tiny_tokenizer
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

HERE = Path(__file__).parent
PLUGIN = "moelora_plugin.integrations.axolotl.MoeLoraPlugin"
SMALL = {
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MOE = {**SMALL, "moe_intermediate_size": 8, "num_experts_per_tok": 2, "num_experts": 4}
SHARED = {"shared_expert_intermediate_size": 8}
STATE = {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}

# Bases, and the last names of what is to be adapted of them.
BASES = {
    "llama": (tiny_llama, ATTENTION | MLP),
    "mixtral": (
        lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4)),
        ATTENTION,
    ),
    "qwen3_moe": (lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE, head_dim=4)), ATTENTION),
    # Linears and fused experts of the same last names.
    "qwen2_moe": (
        lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**MOE, **SHARED)),
        ATTENTION | MLP | {"shared_expert_gate"},
    ),
    "llama4": (
        lambda: Llama4ForCausalLM(
            Llama4TextConfig(
                **SMALL,
                head_dim=4,
                num_local_experts=4,
                intermediate_size_mlp=24,
                attention_chunk_size=8,
            )
        ),
        ATTENTION | MLP,
    ),
    # Routers and parts of a state-space model that cannot learn.
    "phimoe": (lambda: PhimoeForCausalLM(PhimoeConfig(**SMALL, num_local_experts=4)), ATTENTION),
    "mamba": (lambda: MambaForCausalLM(MambaConfig(**STATE)), {"in_proj"}),
}
# Further settings, by case: of which base, what our own list is then, and the host's words for it.
NARROWED = {
    "with the head": ("qwen2_moe", ["all-linear", "lm_head"], "list"),
    "in one layer": ("qwen2_moe", "all-linear", "layer"),
    "by a preset": ("qwen2_moe", "all-linear", "preset"),
}


def llamafactory_settings(model, folder, more):
    changes = {
        "layer": {"moelora_layers_to_transform": [1]},
        "preset": {"lora_target": None, "moelora_preset": "ld_mole"},
    }.get(more, {})
    settings = {
        "model_name_or_path": model,
        "template": "empty",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "moelora",
        "lora_target": "all-linear,lm_head" if more == "list" else "all",
        "moelora_num_experts": 4,
        "moelora_top_k": 2,
        "dataset": "rows",
        "output_dir": f"{folder}/out",
        "use_cpu": True,
        "report_to": "none",
        **changes,
    }
    return {key: value for key, value in settings.items() if value is not None}


def axolotl_settings(model, folder, more):
    changes = {
        "list": {"lora_target_modules": ["lm_head"]},
        "layer": {"peft_layers_to_transform": [1]},
        "preset": {
            "lora_target_linear": None,
            "moelora": {"preset": "ld_mole", "num_experts": 4, "top_k": 2},
        },
    }.get(more, {})
    return {
        "base_model": model,
        "plugins": [PLUGIN],
        "adapter": "moelora",
        "lora_target_linear": True,
        "moelora": {"num_experts": 4, "top_k": 2},
        "datasets": [{"path": f"{folder}/rows.jsonl", "ds_type": "json", "type": "completion"}],
        "sequence_len": 64,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "learning_rate": 0.01,
        "bf16": False,
        "output_dir": f"{folder}/out",
        **changes,
    }


def ms_swift_settings(model, folder, more):
    changes = {
        "list": {"target_modules": ["all-linear", "lm_head"]},
        "layer": {"moelora_layers_to_transform": "1"},
        "preset": {"target_modules": None, "moelora_preset": "ld_mole"},
    }.get(more, {})
    settings = {
        "model": model,
        "model_type": "llama",  # of which swift makes nothing here
        "template": "dummy",
        "use_cpu": "true",
        "dataset": f"{folder}/rows.jsonl",
        "output_dir": f"{folder}/out",
        "report_to": "none",
        "check_model": "false",
        "tuner_type": "moelora",
        "target_modules": "all-linear",
        "moelora_num_experts": "4",
        "moelora_top_k": "2",
        **changes,
    }
    return {key: value for key, value in settings.items() if value is not None}


SETTINGS = {
    "llamafactory": llamafactory_settings,
    "axolotl": axolotl_settings,
    "ms_swift": ms_swift_settings,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The folder of each base, with a tokenizer."""
    folder = tmp_path_factory.mktemp("bases")
    for name, (make, _) in BASES.items():
        make().save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module", params=SETTINGS)
def answers(request, bases, tmp_path_factory):
    """What a host adapts, by case, in one start."""
    host, folder = request.getfixturevalue(request.param), tmp_path_factory.mktemp("cases")
    (folder / "rows.jsonl").write_text('{"text": "a", "query": "a", "response": "b"}\n')
    named = {name: (name, "all-linear", "") for name in BASES} | NARROWED
    cases = [
        {
            "model": str(bases / base),
            "targets": targets,
            "settings": SETTINGS[request.param](str(bases / base), folder, more),
        }
        for base, targets, more in named.values()
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    script = str(HERE / "all_linear_targets.py")
    host.run("python", script, request.param, "cases.json", "answers.json", cwd=folder)
    return dict(zip(named, json.loads((folder / "answers.json").read_text()), strict=True))


def test_every_linear_that_can_learn_is_adapted_and_nothing_else(answers):
    for name, (_, expected) in BASES.items():
        found = answers[name]
        assert "error" not in found, (name, found)
        assert {key.rpartition(".")[2] for key in found["found"]} == expected, name
        assert found["found"] == found["ours"], name


def test_what_stands_beside_the_word_counts_too(answers):
    every = set(answers["qwen2_moe"]["ours"])
    found = {case: answers[case] for case in NARROWED}
    assert not [answer for answer in found.values() if "error" in answer], found
    head = set(found["with the head"]["found"]) - every
    assert {key.rpartition(".")[2] for key in head} == {"lm_head"}
    assert set(found["in one layer"]["found"]) == {key for key in every if ".layers.1." in key}
    assert set(found["by a preset"]["found"]) == every
