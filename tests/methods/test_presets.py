"""Presets as data: they are complete, compose with explicit values, and are documented."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from preset_cases import adapted, config_of, needed

from moelora_plugin import PRESETS, MoeLoraConfig
from moelora_plugin.errors import ConfigError
from moelora_plugin.model import moelora_layers
from moelora_plugin.presets import Preset, resolve

ROOT = Path(__file__).parents[2]
NEEDY = [name for name, preset in PRESETS.items() if preset.needs]


def docs_generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate_methods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", PRESETS)
def test_it_is_described(name):
    preset = PRESETS[name]
    assert preset.summary.endswith((".", ".)"))
    assert len(preset.summary) <= 90  # two lines of `moelora presets` at 80 columns
    assert re.search(r"20\d\d, arXiv \d{4}\.\d{5}$", preset.source), preset.source
    assert preset.title
    assert preset.numbers
    for sentence in preset.omits:
        assert sentence.endswith("."), sentence


@pytest.mark.parametrize("name", PRESETS)
def test_its_configuration_survives_its_file(name, tmp_path):
    config = config_of(name)
    for key, value in PRESETS[name].overrides.items():
        if key not in needed(name) and key != "target_modules":
            assert getattr(config, key) == value
    config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert MoeLoraConfig.from_pretrained(tmp_path) == config
    assert MoeLoraConfig(**{k: v for k, v in content.items() if k != "peft_type"}) == config


@pytest.mark.parametrize("name", PRESETS)
def test_it_adapts_a_model(name):
    assert moelora_layers(adapted(name))


@pytest.mark.parametrize("name", NEEDY)
def test_what_only_the_user_can_give_is_asked_for_by_its_key(name):
    key, what = next(iter(PRESETS[name].needs.items()))
    with pytest.raises(ConfigError) as caught:
        MoeLoraConfig.from_preset(name)
    assert str(caught.value) == f"Preset {name!r} needs {key}: {what}."


TOP_P = {"router": "top_p", "router_kwargs": {"p": 0.5}}
PRESET = Preset(
    "A preset.",
    "2025, arXiv 2501.00001",
    {
        "r": 8,
        "router": "topk",
        "router_kwargs": {"renormalize": False},
        "aux_losses": {"switch_lb": 0.1, "z": 0.2},
        "init": "adapters",
        "init_kwargs": {"strict": True},
    },
    needs={"init_kwargs.paths": "folders"},
)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {}),
        ({"r": 4}, {"r": 4}),
        ({"lora_alpha": 3}, {"lora_alpha": 3}),
        # Mappings are joined key by key, the explicit value wins, None takes a loss out.
        ({"aux_losses": {"z": 0.3}}, {"aux_losses": {"switch_lb": 0.1, "z": 0.3}}),
        ({"aux_losses": {"switch_lb": None}}, {"aux_losses": {"z": 0.2}}),
        ({"router_kwargs": {"other": 1}}, {"router_kwargs": {"renormalize": False, "other": 1}}),
        ({"router_kwargs": {"renormalize": None}}, {"router_kwargs": {"renormalize": None}}),
        ({"init_kwargs": {"strict": False}}, {"init_kwargs": {"strict": False}}),
        # The same part keeps its options, another part drops them.
        ({"router": "topk"}, {"router_kwargs": {"renormalize": False}}),
        ({"router": "top_p"}, {"router": "top_p", "router_kwargs": None}),
        (TOP_P, TOP_P),
    ],
)  # fmt: skip
def test_explicit_values_go_on_top(values, expected):
    before = dict(PRESET.overrides)
    preset = replace(PRESET, needs={})
    result = resolve("mine", preset, values)
    full = {**PRESET.overrides, **expected}
    assert result == {key: value for key, value in full.items() if value is not None}
    assert dict(PRESET.overrides) == before


def test_what_is_needed_is_joined_with_the_preset_s_own():
    result = resolve("mine", PRESET, {"init_kwargs": {"paths": ["a"]}})
    assert result == {**PRESET.overrides, "init_kwargs": {"strict": True, "paths": ["a"]}}


@pytest.mark.parametrize("values", [{}, {"init_kwargs": {}}, {"init_kwargs": {"paths": None}}])
def test_a_missing_value_is_named(values):
    with pytest.raises(ConfigError, match=r"^Preset 'mine' needs init_kwargs.paths: folders\.$"):
        resolve("mine", PRESET, values)


def test_importing_presets_is_light():
    program = (
        "import sys; from moelora_plugin import PRESETS; "
        "print(sorted({'torch', 'peft', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"MOELORA_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_docs_methods_is_what_the_code_says():
    generator = docs_generator()
    text = generator.FILE.read_text(encoding="utf-8")
    assert generator.generated(text) == text, "run `make methods-table`"


@pytest.mark.parametrize("name", PRESETS)
def test_it_names_each_part_that_it_gives_options_to(name):
    """Or the options would be dropped when somebody names the default part."""
    overrides = PRESETS[name].overrides
    parts = {key.removesuffix("_kwargs") for key in overrides if key.endswith("_kwargs")}
    assert parts <= set(overrides)
