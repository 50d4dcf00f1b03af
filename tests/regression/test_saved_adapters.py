"""What earlier releases saved loads, and answers as it did then."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from preset_cases import base
from safetensors.torch import load_file
from saved_corpus import answer
from tiny import tiny_tokenizer
from torch import nn

from moelora_plugin.checkpoint import load_adapter

CORPORA = sorted(Path(__file__).parent.glob("*.zip"))
CASES = [
    pytest.param(corpus, case, id=f"{corpus.stem}-{case}")
    for corpus in CORPORA
    for case in sorted(
        {name.split("/")[0] for name in zipfile.ZipFile(corpus).namelist() if "/" in name}
    )
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """Each corpus unpacked."""
    unpacked = {corpus: tmp_path_factory.mktemp(corpus.stem) for corpus in CORPORA}
    for corpus, folder in unpacked.items():
        zipfile.ZipFile(corpus).extractall(folder)
    return unpacked


def saved_base(folder: Path) -> nn.Module:
    model = base().double()
    model.load_state_dict(load_file(folder / "base.safetensors"))
    model.name_or_path = "tiny"
    return model


@pytest.mark.parametrize(("corpus", "case"), CASES)
def test_answers_as_when_it_was_saved(
    folders: dict[Path, Path], corpus: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders[corpus]
    monkeypatch.setattr(
        "moelora_plugin.checkpoint.load_processor", lambda *args, **keywords: tiny_tokenizer()
    )
    expected = load_file(folder / "answers.safetensors")[case]
    ours, _ = load_adapter(folder / case, base=saved_base(folder))
    found = answer(case, ours)
    # Bit for bit where it was saved; another processor may add in another order, in fp64.
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    stock = PeftModel.from_pretrained(saved_base(folder), str(folder / case))
    assert torch.equal(answer(case, stock), found)
