"""A run that trains nothing, saves less than it trains or resumes another run does not end well."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from native import natively
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from transformers import Trainer, TrainingArguments

from moelora_plugin import MoeLoraConfig
from moelora_plugin.errors import AdapterError, ConfigError, ReachWarning
from moelora_plugin.model import moelora_layers
from moelora_plugin.run_guards import refuse_other_run

ADAPTER = {
    "r": 2,
    "num_experts": 4,
    "top_k": 2,
    "target_modules": ["q_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}
LORA = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
ROWS = [{"input_ids": [i, i + 1, i + 2, 5], "labels": [i, i + 1, i + 2, 5]} for i in range(3, 15)]


def adapted(**fields):
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), MoeLoraConfig(**{**ADAPTER, **fields}))


def trainer(tmp_path: Path, model, kind=Trainer, **keys):
    keys = {"max_steps": 3, "learning_rate": 1e-2, "save_strategy": "no", **keys}
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
        per_device_train_batch_size=2,
        **keys,
    )
    return kind(model=model, args=arguments, train_dataset=ROWS)


class LossFromElsewhere(Trainer):
    """The loss goes past the adapter, to another part of the model that trains."""

    def compute_loss(self, model, inputs, **_):
        with model.disable_adapter():
            hidden = model.get_base_model().model(inputs["input_ids"]).last_hidden_state
            return model.lm_head(hidden).square().mean()


class NoSignal(Trainer):
    def compute_loss(self, *args, **keywords):
        return 0 * super().compute_loss(*args, **keywords)


class SavesLess(Trainer):
    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        file = Path(output_dir) / "adapter_model.safetensors"
        kept = {name: t for name, t in load_file(file).items() if "layers.0" in name}
        save_file(kept, file)


class SavesNothing(Trainer):
    def _save(self, output_dir=None, state_dict=None):
        Path(output_dir).mkdir(exist_ok=True)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"max_steps": 1},
        {"learning_rate": 0.0},
        {"max_steps": 2, "warmup_steps": 1},  # the first update has a learning rate of 0
        {"optim": "gradamw"},
        {"optim": "rsgd", "gradient_accumulation_steps": 2},
        {"save_strategy": "steps", "save_steps": 1},
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["lm_head"]}], ids=["plain", "head"])
def test_a_run_that_trains_is_left_alone(tmp_path, caplog, keys, fields):
    trainer(tmp_path, adapted(**fields), **keys).train()
    assert not [r for r in caplog.records if r.name.startswith("moelora_plugin")]


def test_a_part_may_be_frozen_on_purpose(tmp_path, caplog):
    model = adapted()
    for name, parameter in model.named_parameters():
        if "moelora_A" in name or "layers.1" in name:
            parameter.requires_grad = False
    trainer(tmp_path, model).train()
    assert not [r for r in caplog.records if r.name.startswith("moelora_plugin")]


def test_a_frozen_adapter_is_refused_at_the_start(tmp_path):
    model = adapted().requires_grad_(False)
    with pytest.raises(ConfigError, match=r"^All tensors of the MoE-LoRA adapter are frozen"):
        trainer(tmp_path, model, LossFromElsewhere).train()


def test_a_frozen_adapter_beside_what_trains_is_a_warning(tmp_path, caplog):
    model = adapted().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    trainer(tmp_path, model).train()
    assert "All tensors of the MoE-LoRA adapter are frozen, and other" in caplog.text


@pytest.mark.parametrize("init", ["pissa", "milora", "segments"])
def test_a_file_s_configuration_without_its_weights_is_refused(tmp_path, init):
    """Their initialisation reads the base, and is left to the weights that are loaded next."""
    adapted(init=init).save_pretrained(tmp_path / "adapter")
    config = MoeLoraConfig.from_pretrained(tmp_path / "adapter")
    config.inference_mode = False
    with pytest.raises(ConfigError, match=rf"init='{init}' left them to the adapter's weights"):
        trainer(tmp_path, get_peft_model(tiny_llama(), config)).train()
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", is_trainable=True)
    trainer(tmp_path, model).train()


def test_a_loss_that_goes_past_the_adapter_is_refused_at_the_first_update(tmp_path):
    model = adapted()
    model.lm_head.requires_grad_(True)
    run = trainer(tmp_path, model, LossFromElsewhere)
    with pytest.raises(ConfigError, match=r"^No gradient reached any of the adapter's 12 "):
        run.train()
    assert run.state.global_step == 0


def test_a_run_in_which_nothing_moves_does_not_end_well(tmp_path):
    with pytest.raises(ConfigError, match=r"^Nothing was learned: 3 updates .* all 12 trainable"):
        trainer(tmp_path, adapted(), NoSignal, weight_decay=0.0).train()


def test_modules_that_do_not_move_are_named(tmp_path, caplog):
    model = adapted()
    layers = moelora_layers(model)
    name, dead = next((n, layer) for n, layer in layers.items() if "layers.1" in n)
    dead.forward = dead.base_layer.forward
    with (
        caplog.at_level(logging.WARNING),
        pytest.warns(ReachWarning, match=re.escape(name.removeprefix("base_model.model."))),
    ):
        trainer(tmp_path, model).train()
    assert f"1 of {len(layers)} adapted modules did not move in 3 updates" in caplog.text
    assert name in caplog.text


@pytest.mark.parametrize(
    ("kind", "said"),
    [(SavesLess, "lacks 6 of the 12 tensors"), (SavesNothing, "is not there")],
)
def test_a_checkpoint_without_the_adapter_ends_the_run(tmp_path, kind, said):
    run = trainer(tmp_path, adapted(), kind, save_strategy="steps", save_steps=1)
    with pytest.raises(AdapterError, match=said):
        run.train()
    assert run.state.global_step == 1


def test_an_engines_shards_pass_and_can_be_compared_later(tmp_path):
    class Shards(SavesNothing):
        def _save(self, output_dir=None, state_dict=None):
            super()._save(output_dir)
            (Path(output_dir) / "pytorch_model_fsdp_0").mkdir()

    trainer(tmp_path, adapted(), Shards, **SAVING).train()
    with pytest.raises(ConfigError, match=r"^top_k is 1 in this run"):
        refuse_other_run(adapted(top_k=1), tmp_path / "run" / "checkpoint-2")


def test_a_second_adapter_that_is_active_is_the_one_that_is_watched(tmp_path):
    model = adapted()
    model.add_adapter("second", MoeLoraConfig(**ADAPTER))
    model.set_adapter("second")
    before = {name: p.clone() for name, p in model.named_parameters() if ".default" in name}
    trainer(tmp_path, model, save_strategy="steps", save_steps=3).train()
    assert (tmp_path / "run/checkpoint-3/second/adapter_model.safetensors").is_file()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@natively
def test_an_adapter_of_a_transformers_model_is_watched(tmp_path):
    model = tiny_llama()
    model.add_adapter(MoeLoraConfig(**ADAPTER))
    trainer(tmp_path, model, save_strategy="steps", save_steps=3).train()
    model = tiny_llama()
    model.add_adapter(MoeLoraConfig(**ADAPTER))
    run = trainer(tmp_path, model, SavesLess, save_strategy="steps", save_steps=3)
    with pytest.raises(AdapterError, match="lacks 6 of the 12 tensors"):
        run.train()


@pytest.mark.filterwarnings("ignore:.*modify a model with PEFT for a second time")
def test_adapters_are_not_nested(tmp_path):
    saved = tmp_path / "saved"
    adapted().save_pretrained(saved)
    for inner in (adapted(), get_peft_model(tiny_llama(), LORA)):
        message = r"^The base is a PeftModelForCausalLM already, .*`model.load_adapter\(folder, "
        with pytest.raises(ConfigError, match=message):
            get_peft_model(inner, MoeLoraConfig(**ADAPTER))
        with pytest.raises(ConfigError, match=message):
            PeftModel.from_pretrained(inner, saved)


@pytest.mark.filterwarnings("ignore:.*modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_another_adapter_around_ours_is_refused_when_it_trains(tmp_path):
    model = get_peft_model(adapted(), LORA)
    with pytest.raises(ConfigError, match=r"^The model holds a PeftModel inside another"):
        trainer(tmp_path, model).train()


SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
OTHERS = [
    ({"top_k": 1}, "top_k is 1 in this run, .* trained with 2"),
    ({"lora_alpha": 8}, "lora_alpha is 8 .* trained with 16"),
    ({"use_rslora": True}, "use_rslora is True"),
    ({"lora_dropout": 0.2}, "lora_dropout is 0.2"),
    ({"num_experts": 3}, "num_experts is 3"),
    ({"router_modifiers": {"temperature": 0.5}}, "router_modifiers is {'temperature': 0.5}"),
    ({"aux_losses": {"z": 0.1}}, "aux_losses is {'z': 0.1}"),
    ({"target_modules": ["q_proj"]}, "target_modules is"),
    ({"target_modules": "all-linear"}, "target_modules"),
    ({"target_modules": ".*q_proj"}, "target_modules of this run .* 6 tensors .* in one of"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resumed")
    trainer(folder, adapted(), optim="gradamw", **SAVING).train()
    return folder / "run" / "checkpoint-2"


@pytest.mark.parametrize(("fields", "said"), OTHERS, ids=[json.dumps(f) for f, _ in OTHERS])
def test_a_resumed_run_asks_for_the_adapter_of_its_checkpoint(tmp_path, checkpoint, fields, said):
    model = adapted(**fields)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=f"^{said}.*resuming"):
        trainer(tmp_path, model, optim="gradamw").train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_same_run_resumes_wherever_its_base_has_moved(tmp_path, checkpoint):
    model = adapted(target_modules=["down_proj", "q_proj"])
    model.peft_config["default"].base_model_name_or_path = "moved"
    run = trainer(tmp_path, model, optim="gradamw", max_steps=3)
    run.train(resume_from_checkpoint=str(checkpoint))
    assert run.state.global_step == 3


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        ({"optim": "radamw"}, "gate_rescale is 'none' .* with 'sqrt'; .*the optimizer decides it"),
        ({"optim": "grsgd"}, "The optimizer's state is that of another optimizer .* set the opt"),
        ({"optim": "gradamw", "optim_args": "damping=0.5"}, "damping is 0.5 .* made with 1e-06"),
        ({"optim": "gradamw", "optim_args": "order=gauss_seidel"}, "order is 'gauss_seidel'"),
        (
            {"optim": "gradamw", "optim_args": "gate_max_grad_norm=null"},
            "gate_max_grad_norm is None",
        ),
        ({"optim": "gradamw", "adam_beta2": 0.9}, r"betas is \(0.9, 0.9\)"),
    ],
    ids=str,
)
def test_a_resumed_run_has_the_optimizer_of_its_checkpoint(tmp_path, checkpoint, optimizer, said):
    run = trainer(tmp_path, adapted(), **optimizer)
    with pytest.raises(ConfigError, match=f"^{said}"):
        run.train(resume_from_checkpoint=str(checkpoint))


def test_the_last_checkpoint_is_compared_as_well(tmp_path):
    trainer(tmp_path, adapted(), **SAVING).train()
    with pytest.raises(ConfigError, match=r"^top_k is 3"):
        trainer(tmp_path, adapted(top_k=3), max_steps=3).train(resume_from_checkpoint=True)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    trainer(tmp_path, get_peft_model(tiny_llama(), LORA), **SAVING).train()
    with pytest.raises(ConfigError, match=r"holds an adapter of type LORA and this run .* MOELORA"):
        trainer(tmp_path, adapted(), max_steps=3).train(resume_from_checkpoint=True)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_runs_without_our_layers_pass_through(tmp_path, caplog):
    for model in (tiny_llama(), get_peft_model(tiny_llama(), LORA)):
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
        trainer(tmp_path, model, NoSignal, weight_decay=0.0).train()
    assert not [r for r in caplog.records if r.name.startswith("moelora_plugin")]


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000, b"\xff\xfe", b"null"])
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_checkpoint_is_named(file, content, tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises((AdapterError, ConfigError), match=re.escape(str(tmp_path / file))):
        refuse_other_run(model, tmp_path)
