"""A path in a saved configuration is never opened; one that a person gives is read with care."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import shutil
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from native import TAKES_ADAPTERS
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_config, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_tokenizer
from torch import nn

from moelora_plugin import MoeLoraConfig, load_adapter
from moelora_plugin.analysis.plan import plan_adapter
from moelora_plugin.base_model import load_config
from moelora_plugin.errors import AdapterError, ConfigError
from moelora_plugin.export import export_adapter
from moelora_plugin.initialization import adapters as of_adapters
from moelora_plugin.values import SavedPaths

TARGETS = ["q_proj", "v_proj"]


def base():
    return tiny_llama(len(tiny_tokenizer()), hidden=16, layers=1)


@pytest.fixture
def dangerous(tmp_path):
    """Files that hang, that never end, that are large, that hold somebody's secrets."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "secret.json").write_text('{"q_proj": {"ranks": [1, 2]}}')
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(65 * 2**20)  # takes no room on disk
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    (tmp_path / "link.json").symlink_to("/dev/zero")
    return tmp_path


FILES = ["fifo", "secret.json", "large.json", "/dev/zero", "missing.json", "."]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("allocation", ["modules", "uniform", "layers"])
def test_a_saved_allocation_names_no_file(file, allocation, dangerous, edited):
    path = str(dangerous / file)
    folder = edited(allocation=allocation, allocation_kwargs={"path": path})
    for reader in (MoeLoraConfig, PeftConfig):
        with pytest.raises(ConfigError, match=r"allocation_kwargs\['path'\] names a file"):
            reader.from_pretrained(str(folder))
    with pytest.raises(ConfigError, match="put the file's content in its place"):
        load_adapter(folder, device="cpu")


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("fifo", "is no regular file"),
        ("/dev/zero", "is no regular file"),
        ("link.json", "is no regular file"),
        (".", "is no regular file"),
        ("large.json", "bytes, of which at most"),
        ("deep.json", "is nested too deeply"),
        ("binary.json", "is not UTF-8 text"),
        ("missing.json", "No such file"),
    ],
)
def test_a_persons_allocation_file_has_to_be_one(file, reason, dangerous):
    with pytest.raises(ConfigError, match=rf"allocation_kwargs\['path'\].*{reason}"):
        MoeLoraConfig(allocation="modules", allocation_kwargs={"path": dangerous / file})


@pytest.mark.parametrize("path", [3, None, ["a"], {"a": 1}, True])
def test_a_path_is_a_path(path):
    with pytest.raises(ConfigError, match=r"allocation_kwargs\['path'\]="):
        MoeLoraConfig(allocation="modules", allocation_kwargs={"path": path})


@pytest.mark.parametrize("content", ["[]", "3", "null", '{"a": []}', '{"a": {"ranks": "x"}}', "{}"])
def test_a_persons_allocation_file_holds_an_allocation(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ConfigError, match="allocation"):
        MoeLoraConfig(allocation="modules", allocation_kwargs={"path": str(tmp_path / "a.json")})


def test_a_persons_file_is_in_the_saved_configuration(dangerous, tmp_path):
    path = dangerous / "secret.json"
    config = MoeLoraConfig(top_k=1, allocation="modules", allocation_kwargs={"path": path})
    config.save_pretrained(tmp_path / "saved")
    read = MoeLoraConfig.from_pretrained(str(tmp_path / "saved"))
    assert read.allocation_kwargs == {"modules": {"q_proj": {"ranks": [1, 2]}}}


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Two LoRAs of the tiny base."""
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = get_peft_model(base(), LoraConfig(r=2, target_modules=TARGETS))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        folders.append(str(tmp_path_factory.mktemp("loras")))
        model.save_pretrained(folders[-1])
    return folders


@pytest.fixture
def made_of_loras(loras, tmp_path):
    config = MoeLoraConfig(
        **{"init": "adapters", "init_kwargs": {"paths": loras}, "lora_dropout": 0.0},
        **{"num_experts": 2, "top_k": 1, "r": 2, "target_modules": TARGETS},
    )
    torch.manual_seed(0)
    model = get_peft_model(base(), config).eval()
    model.save_pretrained(tmp_path / "made")
    ids = torch.arange(6)[None]
    return tmp_path / "made", ids, model(ids).logits


@pytest.fixture
def opens(monkeypatch):
    """What is opened, or downloaded, of what init_kwargs names."""
    opened = []
    real = of_adapters._local_folder
    monkeypatch.setattr(
        of_adapters, "_local_folder", lambda path: opened.append(path) or real(path)
    )
    return opened


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("paths", ["as they were", "of the machine's own", "gone"])
def test_an_adapter_made_of_others_loads_without_them(
    paths, trainable, made_of_loras, opens, tmp_path
):
    folder, ids, expected = made_of_loras
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text())
    content["init_kwargs"] = {
        "as they were": content["init_kwargs"],
        "of the machine's own": {"paths": ["/etc", "/"], "subtract": ["somebody/else"]},
        "gone": {"paths": ["nowhere/a", "nowhere/b"]},
    }[paths]
    del content["checksum"]  # its maker's would be right
    file.write_text(json.dumps(content))
    loaded = PeftModel.from_pretrained(base(), str(folder), is_trainable=trainable).eval()
    assert torch.equal(loaded(ids).logits, expected)
    if TAKES_ADAPTERS:
        native = base()
        native.load_adapter(str(folder), peft_config=None, is_trainable=trainable)
        assert torch.equal(native.eval()(ids).logits, expected)
    assert opens == []
    # Saved anew, the file still says what its maker wrote.
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert again["init_kwargs"] == content["init_kwargs"]


def test_paths_of_a_file_stay_shut_whatever_becomes_of_the_configuration(made_of_loras, opens):
    config = MoeLoraConfig.from_pretrained(str(made_of_loras[0]))
    for other in (
        replace(config, r=4),
        deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        MoeLoraConfig(**config.to_dict()),
        MoeLoraConfig.from_preset("moe_lora", init="adapters", init_kwargs=config.init_kwargs),
    ):
        assert isinstance(other.init_kwargs["paths"], SavedPaths)
        other.from_file = other.inference_mode = False  # as if an adapter was to start from it
        fields = {"num_experts": 2, "top_k": 1, "target_modules": TARGETS}
        for key, value in fields.items():
            setattr(other, key, value)
        with pytest.raises(ConfigError, match="init_kwargs of a saved configuration names"):
            get_peft_model(base(), other)
    assert opens == []


def test_a_mapping_with_a_type_names_no_adapters(loras, opens):
    content = {"peft_type": "MOELORA", "init": "adapters", "init_kwargs": {"paths": loras}}
    with pytest.raises(ConfigError, match=r"init_kwargs\['paths'\] names adapters, and none is"):
        get_peft_config(content)
    assert opens == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "is nested too deeply"),
        ("[1, 2]", "holds a list, not an object"),
        ("null", "holds a NoneType, not an object"),
        ('{"peft_type": "MOELORA"', "is not valid JSON"),
        ("", "is not valid JSON"),
    ],
)
def test_a_configuration_file_that_is_none(content, message, edited):
    folder = edited()
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(AdapterError, match=message):
        MoeLoraConfig.from_pretrained(str(folder))


def test_a_configuration_file_is_a_file_and_of_a_size(edited):
    folder = edited()
    with (folder / "adapter_config.json").open("r+b") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(AdapterError, match="bytes, of which at most"):
        MoeLoraConfig.from_pretrained(str(folder))


READ_THE_BASE = {
    "load_adapter": lambda folder, out: load_adapter(folder, device="cpu"),
    "export exact": lambda folder, out: export_adapter(folder, out, to="merged"),
    "export mean-gate": lambda folder, out: export_adapter(
        folder, out, to="merged", strategy="mean-gate", calibration_tasks=["sst2"]
    ),
    "plan": lambda folder, out: plan_adapter(base_of(folder), MoeLoraConfig()),
    "load_config": lambda folder, out: load_config(base_of(folder)),
}


def base_of(folder) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.mark.parametrize("read", READ_THE_BASE)
def test_a_base_that_is_a_file_is_not_opened(read, edited, dangerous, monkeypatch):
    """transformers takes such a name for a configuration's file and reads it."""
    secret, opened, real = str(dangerous / "secret.json"), [], builtins.open

    def watching(file, *args, **kwargs):
        opened.append(str(file))
        return real(file, *args, **kwargs)

    folder = edited(base_model_name_or_path=secret)
    monkeypatch.setattr(builtins, "open", watching)
    with pytest.raises(ConfigError, match=r"secret\.json' is a file; pass the folder of a model"):
        READ_THE_BASE[read](folder, dangerous / "out")
    assert secret not in opened


def test_no_loader_unpickles(edited, tmp_path):
    """With a pickle in the safetensors file's place, and in those of a training checkpoint."""

    class Runs:
        def __reduce__(self):
            return (open, (str(tmp_path / "trace"), "w"))

    folder = edited()
    (folder / "adapter_model.safetensors").unlink()
    for name in ("adapter_model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth"):
        torch.save({"base_model.model.x": Runs()}, folder / name)
    with pytest.raises(AdapterError, match=r"holds no adapter_model\.safetensors"):
        load_adapter(folder, device="cpu")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        PeftModel.from_pretrained(base(), str(folder))
    assert not (tmp_path / "trace").exists()


def test_code_beside_a_base_or_a_tokenizer_is_not_run(edited, saved, tmp_path):
    """`auto_map` asks transformers to import a file of the folder."""
    for place, file in (("base", "config.json"), ("adapter", "tokenizer_config.json")):
        folder = edited(base_model_name_or_path=str(tmp_path / "base"))
        base().save_pretrained(tmp_path / "base")
        tiny_tokenizer().save_pretrained(tmp_path / "base")
        target = tmp_path / "base" if place == "base" else folder
        path = target / file
        content = json.loads(path.read_text())
        code = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "code.Runs")
        content["auto_map"] = {**code, "AutoTokenizer": ["code.Runs", "code.Runs"]}
        content["model_type"] = "somebodys" if place == "base" else None
        content["tokenizer_class"] = "SomebodysTokenizer"
        path.write_text(json.dumps(content))
        (target / "code.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\nRuns = 1\n")
        with pytest.raises(ConfigError, match=r"trust_remote_code|custom code"):
            load_adapter(folder, device="cpu")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha_pattern": {"(a+)+": 4}}, r"alpha_pattern has the pattern '\(a\+\)\+', which can"),
        ({"alpha_pattern": {"(": 4}}, "alpha_pattern has the pattern '\\(', which is no regular"),
        ({"alpha_pattern": [1]}, "alpha_pattern map names to numbers"),
        ({"alpha_pattern": {"q_proj": "4"}}, "alpha_pattern map names to numbers"),
        ({"lora_alpha": None}, "lora_alpha must be a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan must be a finite number"),
        ({"lora_alpha": True}, "lora_alpha must be a number"),
        (None, "holds a NoneType, not an object"),
        ([], "holds a list, not an object"),
    ],
)
def test_a_lora_that_experts_are_made_of_is_read_with_care(values, message, loras, tmp_path):
    folder = tmp_path / "lora"
    shutil.copytree(loras[0], folder)
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **values} if isinstance(values, dict) else values))
    config = MoeLoraConfig(
        **{"init": "adapters", "init_kwargs": {"paths": [str(folder)]}, "target_modules": TARGETS},
        **{"num_experts": 1, "top_k": 1, "r": 2},
    )
    with pytest.raises((AdapterError, ConfigError), match=message):
        get_peft_model(base(), config)


def test_a_lora_without_finite_weights_becomes_no_expert(loras, tmp_path):
    folder = tmp_path / "lora"
    shutil.copytree(loras[0], folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    config = MoeLoraConfig(
        **{"init": "adapters", "init_kwargs": {"paths": [str(folder)]}, "target_modules": TARGETS},
        **{"num_experts": 1, "top_k": 1, "r": 2},
    )
    with pytest.raises(AdapterError, match="that are no finite numbers"):
        get_peft_model(base(), config)
