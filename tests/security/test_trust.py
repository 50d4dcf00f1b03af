"""`--trust`: a person says whose code a command may import for an adapter."""

from __future__ import annotations

import json
import sys

import pytest
from task_rows import write_data
from typer.testing import CliRunner

from moelora_cli.main import app
from moelora_plugin import MoeLoraConfig, families
from moelora_plugin.errors import ConfigError
from moelora_plugin.routers import Router

MODULE = """
from moelora_plugin.losses import switch_lb
from moelora_plugin.routers import TopKRouter

class Theirs(TopKRouter):
    pass

def balance(inputs, *, weight: float = 1.0):
    return switch_lb(inputs) * weight

def of_four(a, b, c, d):
    pass

class NoPart:
    pass
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the adapter's maker, which the user has looked at."""
    (tmp_path / "theirs.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "theirs"
    sys.modules.pop("theirs", None)


def run(*words) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(map(str, words)))
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize(
    ("name", "option"),
    [("theirs.Theirs", "theirs.Theirs"), ("mine", "mine=theirs.Theirs")],
)
def test_a_router_of_the_makers_is_loaded_where_it_is_trusted(name, option, module, edited):
    folder = edited(router=name)
    code, output = run("inspect", folder)
    assert code == 1
    assert f"names the router {name!r}, which is neither built in nor registered" in output
    code, output = run("inspect", folder, "--trust", option)
    assert code == 0, output


def test_losses_and_routers_are_trusted_together(module, edited):
    folder = edited(router="theirs.Theirs", aux_losses={"theirs.balance": 0.1})
    assert run("inspect", folder, "--trust", "theirs.Theirs")[0] == 1
    code, output = run("inspect", folder, "--trust", "theirs.Theirs", "--trust", "theirs.balance")
    assert code == 0, output


def test_a_trusted_adapter_is_scored(module, edited, tmp_path):
    code, output = run(
        *("eval", "--adapter", edited(router="theirs.Theirs"), "--tasks", "sst2", "--limit", "1"),
        *("--data-dir", write_data(tmp_path / "data", ["sst2"]), "--output", tmp_path / "e.json"),
        *("--trust", "theirs.Theirs", "--no-cache"),
    )
    assert code == 0, output


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("theirs.NoPart", "--trust theirs.NoPart is a part of no family (sites, router_inputs, "),
        ("theirs.of_four", "--trust theirs.of_four is a part of no family"),
        ("theirs.missing", "Cannot import part 'theirs.missing'"),
        ("nowhere.at.all", "Cannot import part 'nowhere.at.all'"),
        ("theirs", "Cannot import part 'theirs'"),
        ("", "Cannot import part ''"),
        ("os.system", "--trust os.system is a part of no family"),
        ("topk=theirs.Theirs", "The router 'topk' is built in; register yours by another name."),
    ],
)
def test_what_cannot_be_trusted_is_a_sentence(option, message, module, saved):
    code, output = run("inspect", saved, "--trust", option)
    assert code == 1
    assert message in output


@pytest.mark.parametrize(
    "command", ["inspect", "eval", "export", "plan", "cluster", "train", "search guilomo"]
)
def test_every_command_that_may_load_an_adapter_or_a_recipe_has_the_option(command):
    assert "--trust" in run(*command.split(), "--help")[1]


def test_trust_is_not_a_key_that_a_file_could_set(edited, module):
    with pytest.raises(ConfigError, match="MoeLoraConfig has no key 'trust'"):
        MoeLoraConfig.from_pretrained(str(edited(trust=["theirs.Theirs"])))
    assert "theirs" not in sys.modules


def test_a_class_is_trusted_as_a_part_of_its_own_family_alone(module):
    families.trust("theirs.Theirs")
    found = {name for name, parts in families._registered.items() if "theirs.Theirs" in parts}
    assert found == {"routers"}
    assert issubclass(families.find("routers", "theirs.Theirs"), Router)


def test_the_saved_configuration_keeps_the_name(module, tmp_path):
    MoeLoraConfig(router="theirs.Theirs").save_pretrained(tmp_path / "saved")
    content = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert content["router"] == "theirs.Theirs"
