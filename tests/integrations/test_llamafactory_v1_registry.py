"""Registration with LLaMA-Factory v1's registries, on a stand-in of its modules: no host needed.

In 0.9.5 one registry serves all families and entries have methods; in 0.9.6 each family has its
own, `register` takes no name, options come by keyword, and the optimizers' module has moved.
"""

from __future__ import annotations

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification

from moelora_plugin import MoeLoraConfig, RiemannianAdamW, RiemannianSGD, autoload
from moelora_plugin.checkpoint import save_adapter
from moelora_plugin.errors import ConfigError, ExportError
from moelora_plugin.model import find_tuner, moelora_layers
from moelora_plugin.optim import OPTIMIZERS
from moelora_plugin.training.examples import build_example

REGISTRIES = {
    "0.9.5": """
        from collections import defaultdict
        class BasePlugin:
            _registry = defaultdict(dict)
            def __init__(self, name): self.name = name
            def register(self, method="__call__"):
                assert method not in self._registry[self.name], (self.name, method)
                return lambda f: self._registry[self.name].setdefault(method, f)
            def __getitem__(self, method): return self._registry[self.name][method]
            def __call__(self, *args, **keywords): return self["__call__"](*args, **keywords)
    """,
    "0.9.6": """
        class BasePlugin:
            def __init_subclass__(cls): cls._registry = {}
            def __init__(self, name): self.name = name
            def register(self):
                return lambda f: self._registry.setdefault(self.name, f)
            def __call__(self, *args, **keywords):
                return self._registry[self.name](*args, **keywords)
    """,
}
OPTIMIZERS_AT = {
    "0.9.5": "plugins/trainer_plugins/optimizer.py",
    "0.9.6": "plugins/trainer_plugins/optimizers/optimizer.py",
}
FAMILY = "from llamafactory.v1.utils.plugin import BasePlugin\nclass {}(BasePlugin): pass\n"
FILES = {
    "utils/callbacks.py": "class TrainerCallback: pass\n",
    "accelerator/interface.py": """
        class DistributedInterface:
            def get_rank(self): return 0
    """,
    "plugins/model_plugins/peft.py": FAMILY.format("PeftPlugin")
    + """
from types import SimpleNamespace
def load_adapter(model, adapter_name_or_path, is_train): return "loaded"
def get_args(config): return SimpleNamespace(peft_config=config), None, None, None
def merge_and_export_model(config):
    "v1's own."
    if config is None or config["name"] != "lora": raise ValueError("only supported for lora")
    return config["export_dir"]
""",
    "plugins/data_plugins/converter.py": FAMILY.format("DataConverterPlugin"),
    "core/base_trainer.py": """
        from types import SimpleNamespace
        class BaseTrainer:
            global_step = 0
            args = SimpleNamespace(resume_from_checkpoint=None)
            def __init__(self, model, callbacks, generator):
                self.model, self.generator = model, generator
                self.callback_handler = type("Handler", (), {"callbacks": callbacks})()
            def fit(self, logs):
                "v1's own."
                for callback in self.callback_handler.callbacks:
                    what = {"model": self.model, "train_dataloader": self.generator}
                    callback.on_train_begin(None, None, optimizer=None, **what)
                self.model(input_ids=__import__("torch").arange(8).view(2, 4))
                for callback in self.callback_handler.callbacks:
                    if hasattr(callback, "on_log"):
                        callback.on_log(None, None, model=self.model, logs=logs)
                return logs
    """,
}
TEMPLATES = "llamafactory.v1.plugins.model_plugins.rendering"
RENDERING = FAMILY.format("RenderingPlugin") + "    _attempted_template_imports = set()\n"


@pytest.fixture(params=list(REGISTRIES))
def version(request) -> str:
    return request.param


@pytest.fixture
def v1(version, tmp_path, monkeypatch):
    """The stand-in's modules, imported while our hooks are in place."""
    files = {**FILES, "utils/plugin.py": REGISTRIES[version]}
    files[OPTIMIZERS_AT[version]] = FAMILY.format("OptimizerPlugin")
    files["plugins/model_plugins/rendering.py"] = RENDERING.replace(": pass", ":")
    for name, text in files.items():
        file = tmp_path / "llamafactory" / "v1" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedented(text))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    autoload.activate()
    modules = {}
    for name in files:
        path = name.removesuffix(".py").replace("/", ".")
        modules[path.rpartition(".")[2]] = importlib.import_module(f"llamafactory.v1.{path}")
    failed = [name for name in autoload.failures if name.startswith("llamafactory")]
    assert failed == ([] if version == "0.9.5" else [TEMPLATES])
    yield SimpleNamespace(**modules)
    for name in [name for name in sys.modules if name.partition(".")[0] == "llamafactory"]:
        del sys.modules[name]
    autoload.failures.pop(TEMPLATES, None)


def dedented(text: str) -> str:
    lines = text.strip("\n").splitlines()
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return "\n".join(line[indent:] for line in lines) + "\n"


@pytest.fixture
def adapted(v1, version):
    """Call v1's PeftPlugin as that version does."""

    def call(model, is_train=True, **options):
        plugin = v1.peft.PeftPlugin("moelora")
        options = {"name": "moelora", **options}
        if version == "0.9.5":
            return plugin(model, options, is_train)
        return plugin(model, peft_config=options, is_train=is_train)

    return call


SMALL = {"r": "2", "num_experts": 4, "top_k": 2, "target_modules": "q_proj, down_proj"}


def test_options_become_the_adapter(adapted):
    model = adapted(tiny_llama(), preset="gr_moe_lora", aux_losses={"switch_lb": "1e-3"}, **SMALL)
    config = model.peft_config["default"]
    assert (config.r, config.num_experts, config.gate_rescale) == (2, 4, "sqrt")
    assert sorted(config.target_modules) == ["down_proj", "q_proj"]
    assert config.aux_losses == {"switch_lb": 1e-3}
    assert config.task_type == "CAUSAL_LM"
    every = adapted(tiny_llama(), **{**SMALL, "target_modules": "all"})
    assert len(moelora_layers(every)) == 14


def test_a_reward_model_keeps_its_head(adapted, tmp_path):
    torch.manual_seed(0)
    tiny = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, vocab_size=64,
                       num_attention_heads=2, num_labels=1)  # fmt: skip
    model = adapted(LlamaForTokenClassification(tiny), **SMALL)
    assert model.base_model.model.score.modules_to_save["default"].weight.requires_grad
    save_adapter(model, tmp_path / "reward")
    path = str(tmp_path / "reward")
    further = adapted(LlamaForTokenClassification(tiny), adapter_name_or_path=path, **SMALL)
    heads = [m.base_model.model.score.modules_to_save["default"].weight for m in (model, further)]
    assert heads[1].requires_grad
    assert torch.equal(*heads)
    # An adapter of SFT has none, which PEFT would find out with a KeyError.
    save_adapter(adapted(LlamaForCausalLM(tiny), **SMALL), tmp_path / "sft")
    path = str(tmp_path / "sft")
    with pytest.raises(
        ConfigError, match=r"sft' was not trained as a reward model and has no head"
    ):
        adapted(LlamaForTokenClassification(tiny), adapter_name_or_path=path, **SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_expert": 4}, "has no key 'num_expert'; did you mean 'num_experts'"),
        ({"export_dir": "x"}, "has no key 'export_dir'"),
        ({"r": "4.0"}, "r=4.0 must be an integer"),
        ({"lora_dropout": "much"}, "lora_dropout='much' must be a number"),
        ({"adapter_name_or_path": ["a", "b"]}, "names 2 adapters"),
    ],
)
def test_refused(adapted, options, message):
    with pytest.raises(ConfigError, match=message):
        adapted(tiny_llama(), **options)


def test_nothing_to_chat_with(adapted):
    with pytest.raises(ConfigError, match="without adapter_name_or_path there is no adapter"):
        adapted(tiny_llama(), is_train=False, **SMALL)


def test_a_base_without_weights(adapted):
    model = tiny_llama()
    model._init_mode = "init_on_meta"
    with pytest.raises(ConfigError, match="remove init_config"):
        adapted(model, **SMALL)


def test_a_saved_adapter_is_loaded_unmerged(adapted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = adapted(tiny_llama(), **SMALL)
    for name, parameter in first.named_parameters():
        if "moelora_B" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(first, "2024")  # v1 makes a number of this path
    ids = torch.arange(8).view(1, 8)
    expected = first.eval()(ids).logits

    chat = adapted(tiny_llama(), is_train=False, adapter_name_or_path=2024)
    assert not chat.training
    torch.testing.assert_close(chat(ids).logits, expected, rtol=0, atol=0)
    further = adapted(tiny_llama(), adapter_name_or_path=["2024"], gate_rescale="auto", **SMALL)
    assert any(p.requires_grad for p in further.parameters())
    for other in ({"r": 8}, {"preset": "single_lora", "r": None}):
        with pytest.raises(ConfigError, match="and keeps it; remove the key, or the preset"):
            adapted(tiny_llama(), adapter_name_or_path="2024", **{**SMALL, **other})


def test_an_adapter_of_another_kind(adapted, tmp_path):
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="of type LORA; set peft_config's name to lora"):
        adapted(tiny_llama(), adapter_name_or_path=str(tmp_path))


@pytest.mark.parametrize("is_train", [True, False])
def test_a_saved_adapter_keeps_its_configuration(adapted, tmp_path, is_train):
    folder = tmp_path / "adapter"
    save_adapter(adapted(tiny_llama(), **SMALL), folder)
    for key, value in {"top_k": 1, "lora_alpha": 3, "use_rslora": True, "target_modules": "all",
                       "modules_to_save": "lm_head", "init": "pissa"}.items():  # fmt: skip
        options = {**SMALL, key: value}
        with pytest.raises(ConfigError, match=rf"^peft_config's {key} is .* was trained with .*"):
            adapted(tiny_llama(), is_train, adapter_name_or_path=str(folder), **options)


def test_plain_lora_does_not_train_a_mixture_on(v1, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    config = MoeLoraConfig(num_experts=2, top_k=1, target_modules=["q_proj"])
    get_peft_model(tiny_llama(), config).save_pretrained(ours)
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(theirs)
    for path, trains in ((theirs, True), ([str(theirs)], True), (ours, False), ("a hub/id", True)):
        assert v1.peft.load_adapter(None, path, trains) == "loaded"
    for path in (ours, [str(ours)]):
        with pytest.raises(ConfigError, match=r"is a mixture .* set peft_config's name to moelora"):
            v1.peft.load_adapter(None, path, True)


def test_merge(v1):
    merge = v1.peft.merge_and_export_model
    assert merge({"name": "lora", "export_dir": "there"}) == "there"
    assert merge.__doc__ == "v1's own."
    with pytest.raises(ExportError, match="moelora export ADAPTER --to merged"):
        merge({"name": "moelora", "export_dir": "there"})
    for config in (None, {"name": "freeze"}):
        with pytest.raises(ValueError, match="only supported for lora"):
            merge(config)


@pytest.fixture
def optimizer(v1):
    def call(model, name, **options):
        return v1.optimizer.OptimizerPlugin(name)(model, {"name": name, **options})

    return call


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_optimizers(adapted, optimizer, name):
    model = adapted(tiny_llama(), **SMALL)
    wrapper = torch.nn.Module()  # as DistributedDataParallel wraps
    wrapper.module = model
    options = {"betas": "0.8, 0.95", "eps": "1e-7"} if name.endswith("adamw") else {}
    made = optimizer(
        wrapper, name, lr="1e-3", gate_lr="1e-4", damping="1e-2", weight_decay=0.1, **options
    )
    assert type(made) is (RiemannianAdamW if options else RiemannianSGD)
    experts, gates = made.param_groups
    assert (experts["lr"], gates["lr"], experts["damping"]) == (1e-3, 1e-4, 1e-2)
    assert (experts["weight_decay"], gates["weight_decay"]) == (0.1, 0.0)
    if options:
        assert (experts["betas"], experts["eps"]) == ((0.8, 0.95), 1e-7)
    assert model.peft_config["default"].gate_rescale_used == ("sqrt" if name[0] == "g" else "none")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gradamw", {}, "optim_config: set lr"),
        ("gradamw", {"lr": "fast"}, "optim_config: lr='fast' must be a number"),
        ("gradamw", {"lr": 1, "damp": 1}, "optim_config has no key 'damp'; did you mean 'damping'"),
        ("gradamw", {"lr": 1, "damping": "x"}, "optim_config: damping='x' must be a number"),
        ("gradamw", {"lr": 1, "betas": 0.9}, "betas=0.9 must be two numbers"),
        ("grsgd", {"lr": 1, "betas": [0.9, 0.99]}, "grsgd has no betas"),
        ("rsgd", {"lr": 1, "eps": 1e-8}, "rsgd has no eps"),
    ],
)
def test_refused_optimizer_options(adapted, optimizer, name, options, message):
    with pytest.raises(ConfigError, match=message):
        optimizer(adapted(tiny_llama(), **SMALL), name, **options)


def test_aux_losses_are_scaled_and_logged(adapted, v1):
    trainer_class = v1.base_trainer.BaseTrainer
    assert trainer_class.fit.__doc__ == "v1's own."
    generator = SimpleNamespace(num_micro_batch=4)
    model = adapted(tiny_llama(), aux_losses={"z": 0.1}, **SMALL).train()
    writer = SimpleNamespace(
        on_train_begin=lambda *_, **__: None, on_log=lambda *_, logs, **__: seen.update(logs)
    )
    seen: dict = {}
    logs = trainer_class(model, [writer], generator).fit({"loss": 1.0})
    assert find_tuner(model).aux_losses.scale == 0.25
    assert logs["aux_z"] > 0
    assert seen == logs  # ours comes before the one that writes the log


def test_an_adapter_that_does_not_train_is_refused(adapted, v1):
    model = adapted(tiny_llama(), **SMALL).requires_grad_(False)
    with pytest.raises(ConfigError, match=r"^All tensors of the MoE-LoRA adapter are frozen"):
        v1.base_trainer.BaseTrainer(model, [], None).fit({"loss": 1.0})


def test_other_models_train_without_a_callback(v1):
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    for model in (tiny_llama(), lora):
        trainer = v1.base_trainer.BaseTrainer(model, [], None)
        assert trainer.fit({"loss": 1.0}) == {"loss": 1.0}
        assert trainer.callback_handler.callbacks == []


def test_registering_again_changes_nothing(v1):
    from moelora_plugin.integrations.llamafactory import v1 as ours

    fit = v1.base_trainer.BaseTrainer.fit
    ours.register_trainer()
    assert v1.base_trainer.BaseTrainer.fit is fit


ROW = {"prompt": "Question: yes or no? The correct answer is", "completion": " yes"}


def test_rows_as_text(v1, version):
    messages = v1.converter.DataConverterPlugin("moelora_text")(ROW)["messages"]
    with pytest.raises(ConfigError, match="columns prompt and completion, and the data has text"):
        v1.converter.DataConverterPlugin("moelora_text")({"text": "x"})
    if version != "0.9.5":  # how 0.9.6 registers a template's two functions is not known
        assert "set template to one of its own" in autoload.failures[TEMPLATES]
        return
    template = v1.rendering.RenderingPlugin("moelora_text")
    tokenizer = tiny_tokenizer()
    rendered = template["render_messages"](tokenizer, messages, None, False, False)
    prompt = SimpleNamespace(context=ROW["prompt"], choices=[ROW["completion"]], gold=0)
    own = build_example(tokenizer, prompt, 100)
    assert rendered["input_ids"] == own["input_ids"]
    assert rendered["labels"] == own["labels"]
    assert rendered["loss_weights"] == [float(label != -100) for label in own["labels"]]
    assert rendered["attention_mask"] == [1] * len(own["labels"])
    assert "moelora_text" in v1.rendering.RenderingPlugin._attempted_template_imports

    processor = SimpleNamespace(tokenizer=tokenizer)
    asked = template["render_messages"](processor, messages[:1], None, True, False)
    assert asked["input_ids"] == tokenizer.encode(ROW["prompt"])
    assert set(asked["labels"]) == {-100}
    # In a chat's history the assistant's turns end as they did in training.
    again = template["render_messages"](processor, [*messages, messages[0]], None, True, False)
    assert again["input_ids"][: len(own["input_ids"])] == own["input_ids"]
    assert template["parse_message"](" no") == {
        "role": "assistant",
        "content": [{"type": "text", "value": " no"}],
    }
    with pytest.raises(ConfigError, match="has no tools"):
        template["render_messages"](tokenizer, messages, json.dumps([{}]), False, False)
    image = [{"role": "user", "content": [{"type": "image_url", "value": "x"}]}, messages[1]]
    with pytest.raises(ConfigError, match="takes text only, and the data has image_url"):
        template["render_messages"](tokenizer, image, None, False, False)
