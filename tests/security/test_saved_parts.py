"""Loading a stranger's adapter runs nothing: no name in a saved configuration imports or calls."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_config,
    get_peft_model,
)
from task_rows import write_data
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, pipeline
from typer.testing import CliRunner

from moelora_cli.main import app
from moelora_plugin import MoeLoraConfig, families, load_adapter
from moelora_plugin.clusters import FEATURES, ClusterAssigner, fit_clusters, read_prompts
from moelora_plugin.errors import ConfigError
from moelora_plugin.families import FAMILIES
from moelora_plugin.losses import switch_lb
from moelora_plugin.routers import Router, TopKRouter

# What a name could do if it were imported, called, or only looked up.
PAYLOADS = [
    "hostile.Writes",
    "hostile.call",
    "hostile.TRACE.write_text",
    "cProfile.run",
    "builtins.exec",
    "os.system",
    "subprocess.Popen",
    "torch.save",
    "pathlib.Path.write_text",
    "moelora_plugin.routers.topk.TopKRouter",  # not even our own
    ".hostile.call",
    "hostile",
]
CODE = "open('trace', 'w')"
NAMED = {kind.key: kind for kind in FAMILIES.values() if kind.key}


def naming(key: str, name: str) -> dict:
    """A field that names a part, with a value that the part could be called with."""
    if key == "router_modifiers":
        return {key: {name: CODE}}
    if key == "aux_losses":
        return {key: {name: {"coefficient": 1.0, "cmd": CODE}}}
    options = NAMED[key].options
    return {key: name, **({options: {"file": "trace", "cmd": CODE}} if options else {})}


def base():
    return tiny_llama(len(tiny_tokenizer()), hidden=16, layers=1)


def load_beside_another(folder):
    other = MoeLoraConfig(num_experts=2, top_k=1, target_modules=["q_proj"])
    get_peft_model(base(), other).load_adapter(str(folder), "second")


def content(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def set_state(folder):
    """The configuration of a LoRA that is turned into ours."""
    return PeftConfig.from_peft_type(**content(folder))


ROADS = {
    "PeftModel.from_pretrained": lambda folder: PeftModel.from_pretrained(base(), str(folder)),
    "to train on": lambda folder: PeftModel.from_pretrained(base(), str(folder), is_trainable=True),
    "PeftModel.load_adapter": load_beside_another,
    "AutoPeftModel": lambda folder: AutoPeftModelForCausalLM.from_pretrained(str(folder)),
    "transformers, of a model": lambda folder: base().load_adapter(str(folder)),
    "transformers, by folder": lambda folder: AutoModelForCausalLM.from_pretrained(str(folder)),
    "pipeline": lambda folder: pipeline("text-generation", model=str(folder)),
    "moelora_plugin.load_adapter": lambda folder: load_adapter(folder, device="cpu"),
    "PeftConfig.from_pretrained": lambda folder: PeftConfig.from_pretrained(str(folder)),
    "PeftConfig.from_peft_type": set_state,
    "MoeLoraConfig.from_pretrained": lambda folder: MoeLoraConfig.from_pretrained(str(folder)),
    "get_peft_config": lambda folder: get_peft_config(content(folder)),
    "MoeLoraConfig": lambda folder: MoeLoraConfig(**content(folder)),
}


@pytest.mark.parametrize("road", ROADS)
def test_every_road_refuses_and_runs_nothing(road, edited, trace):
    folder = edited(**naming("router_modifiers", "hostile.call"))
    # pipeline quotes the error of each class that it tries in a ValueError of its own.
    kind = ValueError if road == "pipeline" else ConfigError
    with pytest.raises(kind, match=r"router_modifier 'hostile\.call', which is neither"):
        ROADS[road](folder)
    assert "hostile" not in sys.modules


@pytest.mark.parametrize("road", ROADS)
def test_every_road_still_loads_what_is_built_in(road, saved):
    assert ROADS[road](saved) is not False


def test_a_file_that_does_not_say_its_type_is_a_saved_one_too(edited, trace):
    for peft_type in (None, "MOELORA"):
        folder = edited(**naming("router", "hostile.Writes"), peft_type=peft_type)
        with pytest.raises(ConfigError, match=r"names the router 'hostile\.Writes'"):
            MoeLoraConfig.from_pretrained(str(folder))


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("key", NAMED)
def test_no_name_of_any_family_is_imported(key, payload, saved, trace):
    before = set(sys.modules)
    with pytest.raises(ConfigError) as caught:
        MoeLoraConfig(**{**content(saved), **naming(key, payload)})
    message = str(caught.value)
    assert f"{payload!r}, which is neither built in nor registered here" in message
    assert f"moelora_plugin.{families.registrar(NAMED[key].name)}({payload!r}, ...)" in message
    assert f"'moelora.{NAMED[key].name}'" in message
    assert "--trust " in message
    assert message.endswith("of moelora.")
    assert "hostile" not in set(sys.modules) - before


COMMANDS = {
    "inspect": "inspect {adapter}",
    "eval": "eval --adapter {adapter} --tasks sst2 --limit 1 --data-dir {data} --output eval.json",
    "merge": "export {adapter} --out out --to merged",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_and_runs_nothing(command, edited, trace, tmp_path):
    places = {
        "adapter": edited(**naming("router", "hostile.Writes")),
        "data": write_data(tmp_path / "data", ["sst2"]),
    }
    words = COMMANDS[command].format(**places).split()
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1, result.output
    assert "neither built in nor registered" in " ".join(result.output.split())


def test_a_program_that_never_heard_of_us_runs_nothing_either(edited, trace):
    """Through the entry point of torch.backends, as after a plain `pip install moelora`."""
    folder = edited(**naming("router", "hostile.Writes"))
    program = (
        "import moelora_plugin.autoload, transformers\n"
        f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "neither built in nor registered here" in done.stderr


class Mine(TopKRouter):
    """A router of the user's own."""


@pytest.mark.parametrize("road", ROADS)
def test_what_the_program_has_registered_loads(road, edited):
    families.register_router("mine", Mine)
    ROADS[road](edited(router="mine"))


@pytest.mark.parametrize("name", ["topk", 3, "", None])
def test_a_name_that_is_taken_or_none_is_not_registered(name):
    with pytest.raises(ConfigError, match=r"built in|must be text"):
        families.register_router(name, Mine)


class NoPart:
    """Of no family."""


class Unfinished(Router):
    """Without its methods."""


def of_two(one, two):
    """A function that no family calls."""


STRANGE = [NoPart, NoPart(), Unfinished, exec, os.system, subprocess.Popen, "topk", None, 3]
# A Python function of two arguments is one that an allocation could be.
STRANGE_BY_FAMILY = [
    (family, part)
    for family, kind in FAMILIES.items()
    for part in (STRANGE if kind.kind == "function" else [*STRANGE, torch.save])
]


@pytest.mark.parametrize(
    ("family", "part"),
    STRANGE_BY_FAMILY,
    ids=lambda part: getattr(part, "__name__", str(part)[:12].strip("<")),
)
def test_only_parts_of_the_family_are_registered(family, part, trace):
    with pytest.raises(ConfigError, match=f"The {FAMILIES[family].what} 'mine' is (no|a) "):
        families.register(family, "mine", part)
    with pytest.raises(ConfigError, match="There is no family 'router'"):
        families.register("router", "mine", part)


def test_functions_are_told_apart_by_what_they_are_called_with():
    for family in ("losses", "scales"):
        with pytest.raises(ConfigError, match="is no function of"):
            families.register(family, "mine", lambda one, two, three, four: None)
    families.register_loss("mine", lambda inputs, *, weight=1.0: switch_lb(inputs) * weight)
    config = MoeLoraConfig(aux_losses={"mine": {"coefficient": 0.1, "weight": 2.0}})
    assert config.aux_losses["mine"]["weight"] == 2.0
    with pytest.raises(ConfigError, match=r"aux_losses\['mine'\] has no key 'wait'; did you mean"):
        MoeLoraConfig(aux_losses={"mine": {"coefficient": 0.1, "wait": 2.0}})


def entry_point(place, family: str, name: str, target: str) -> None:
    info = place / "somebodys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[moelora.{family}]\n{name} = {target}\n")


def test_an_installed_package_adds_parts(tmp_path, monkeypatch, edited):
    (tmp_path / "somebodys.py").write_text(
        "from moelora_plugin.routers import TopKRouter\nclass Theirs(TopKRouter):\n    pass\n"
    )
    entry_point(tmp_path, "routers", "theirs", "somebodys:Theirs")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert MoeLoraConfig.from_pretrained(str(edited(router="theirs"))).router == "theirs"
    sys.modules.pop("somebodys")


@pytest.mark.parametrize(
    "target", ["somebodys:Other", "os:system", "builtins:exec", "somebodys:missing", "nowhere:X"]
)
def test_an_entry_point_of_another_kind_is_not_called(target, tmp_path, monkeypatch, edited, trace):
    (tmp_path / "somebodys.py").write_text(
        f"class Other:\n    def __init__(self, *a, **k):\n        open({str(trace)!r}, 'w')\n"
    )
    entry_point(tmp_path, "routers", "theirs", target)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"no subclass of|cannot be imported"):
        MoeLoraConfig.from_pretrained(str(edited(router="theirs")))
    sys.modules.pop("somebodys", None)


def test_a_persons_dotted_path_is_held_to_the_contract_before_it_is_called(tmp_path, monkeypatch):
    (tmp_path / "mistaken.py").write_text(
        "class Other:\n    def __init__(self, *a, **k):\n        raise SystemError('called')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for key in NAMED:
        with pytest.raises(ConfigError, match=r"'mistaken\.Other' is no "):
            MoeLoraConfig(**naming(key, "mistaken.Other"))
    sys.modules.pop("mistaken")


def test_a_module_that_fails_to_import_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("raise ZeroDivisionError('on import')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"Cannot import router 'broken_module\.R': on import"):
        MoeLoraConfig(router="broken_module.R")


def test_what_a_person_names_goes_on_being_known(tmp_path):
    """Copied, pickled, changed and saved in the program that named it."""
    path = f"{TopKRouter.__module__}.TopKRouter"
    config = MoeLoraConfig(router=path, num_experts=2, top_k=1, target_modules=["q_proj"])
    copies = [
        copy.copy(config),
        copy.deepcopy(config),
        replace(config, r=8),
        pickle.loads(pickle.dumps(config)),
        MoeLoraConfig(**config.to_dict()),
    ]
    for other in copies:
        assert other.router == path
        assert not other.is_saved
    get_peft_model(base(), copies[1]).save_pretrained(tmp_path)
    assert content(tmp_path)["router"] == path
    PeftModel.from_pretrained(base(), str(tmp_path))
    families._registered["routers"].clear()  # another program
    with pytest.raises(ConfigError, match="neither built in nor registered"):
        PeftModel.from_pretrained(base(), str(tmp_path))
    pickled = pickle.dumps(config)  # a pickle is code already, and names what a person named
    assert pickle.loads(pickled).router == path
    assert path in families._registered["routers"]


def test_a_path_set_afterwards_is_not_imported(trace):
    """Whoever assigns to a field goes round the check, but not round the import."""
    config = MoeLoraConfig(num_experts=2, top_k=1, target_modules=["q_proj"])
    config.router = "hostile.Writes"
    with pytest.raises(ConfigError, match=r"There is no router 'hostile\.Writes' here; if it is"):
        get_peft_model(base(), config)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_clusters_name_no_code(payload, tmp_path, trace):
    model, tokenizer = base(), tiny_tokenizer()
    texts = ["yes no yes", "positive film", "correct wrong", "A B C D"]
    features = FEATURES["embedding"](model)
    fit_clusters(read_prompts(texts, tokenizer), features, 2).save(tmp_path / "clusters")
    file = tmp_path / "clusters" / "clusters.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "method": payload}))
    with pytest.raises(ConfigError, match=r"There is no feature|Unknown feature"):
        ClusterAssigner.load(tmp_path / "clusters", model)


def test_clusters_of_a_registered_kind_are_saved_and_loaded(tmp_path):
    class Own(FEATURES["embedding"]):
        pass

    model, tokenizer = base(), tiny_tokenizer()
    prompts = read_prompts(["yes no yes", "positive film", "correct wrong"], tokenizer)
    found = fit_clusters(prompts, Own(model), 2)
    with pytest.raises(ConfigError, match=r"call moelora_plugin\.register_features first"):
        found.save(tmp_path / "clusters")
    families.register_features("own", Own)
    found.save(tmp_path / "clusters")
    assert type(ClusterAssigner.load(tmp_path / "clusters", model).features) is Own


@pytest.mark.parametrize(
    ("mapping", "kept"),
    [
        ({"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}, True),
        (
            {
                "base_model_class": "LlamaForCausalLM",
                "parent_library": "transformers.models.llama.modeling_llama",
            },
            True,
        ),
        ({"base_model_class": "Writes", "parent_library": "hostile"}, False),
        ({"base_model_class": "Writes", "parent_library": "transformers_hostile"}, False),
        ({"base_model_class": "a.b", "parent_library": "transformers"}, False),
        ({"base_model_class": ["x"], "parent_library": "transformers"}, False),
        ({"parent_library": "transformers"}, False),
    ],
)
def test_auto_mapping_imports_transformers_alone(mapping, kept, edited, trace):
    folder = edited(task_type=None, auto_mapping=mapping)
    assert (PeftConfig.from_pretrained(str(folder)).auto_mapping == mapping) is kept
    PeftModel.from_pretrained(base(), str(folder))  # which has no use for it
