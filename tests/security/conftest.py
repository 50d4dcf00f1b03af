"""An adapter of a stranger's, and code that says when it runs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from peft import get_peft_model
from tiny import tiny_llama, tiny_tokenizer

from moelora_plugin import MoeLoraConfig, families, save_adapter

# A module whose import, class and function all leave a trace.
HOSTILE = """
from pathlib import Path
TRACE = Path({trace!r})
TRACE.write_text("imported")
class Writes:
    def __init__(self, *args, **kwargs):
        TRACE.write_text("made")
    def __call__(self, *args, **kwargs):
        TRACE.write_text("called")
def call(*args, **kwargs):
    TRACE.write_text("called")
"""


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A small adapter beside its base, as anybody may have published it."""
    folder = tmp_path_factory.mktemp("published")
    tokenizer = tiny_tokenizer()
    base = tiny_llama(len(tokenizer), hidden=16, layers=1)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    config = MoeLoraConfig(
        num_experts=4, top_k=2, r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    save_adapter(get_peft_model(base, config), folder / "adapter", tokenizer=tokenizer)
    return folder / "adapter"


@pytest.fixture
def edited(saved, tmp_path):
    """The adapter with other values in its configuration."""

    def edit(**values) -> Path:
        folder = tmp_path / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, folder)
        file = folder / "adapter_config.json"
        content = {**json.loads(file.read_text()), **values}
        del content["checksum"]  # its maker's would be right
        file.write_text(json.dumps(content))
        manifest = folder / "moelora.json"  # of another configuration
        manifest.unlink()
        return folder

    return edit


@pytest.fixture
def trace(tmp_path, monkeypatch):
    """A folder that is both the working directory and importable, with code that must not run.

    It must not have run when the test is over.
    """
    place = tmp_path / "here"
    place.mkdir()
    file = place / "trace"
    (place / "hostile.py").write_text(HOSTILE.format(trace=str(file)))
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    yield file
    sys.modules.pop("hostile", None)
    assert not file.exists(), file.read_text()


@pytest.fixture(autouse=True)
def nothing_stays_registered():
    kept = {family: dict(parts) for family, parts in families._registered.items()}
    yield
    for family, parts in families._registered.items():
        parts.clear()
        parts.update(kept[family])
