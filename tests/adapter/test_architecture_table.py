"""docs/architectures.md names everything, and what it says is what the sweep does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from adapter_check import architectures, check
from sweep_table import TITLES, document, versions

PAGE = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
ROW = r"^\| (\S+) \| \d* \| (works|as LoRA|refused|not tiny|fault) \|"
# By kind, the outcome of each.
ROWS = {
    section.partition("\n")[0]: dict(re.findall(ROW, section, re.M))
    for section in PAGE.split("\n## ")[1:]
}


def test_the_page_names_every_architecture_and_no_fault():
    written = re.search(r"With transformers (\S+), ", PAGE)
    assert written is not None
    if f"transformers {written[1]}," not in versions():
        pytest.skip(f"the page is that of transformers {written[1]}, which is not installed")
    expected: dict[str, set[str]] = {}
    for task, name in architectures():
        expected.setdefault(TITLES[task], set()).add(name)
    assert {title: set(rows) for title, rows in ROWS.items()} == expected
    assert not any("fault" in rows.values() for rows in ROWS.values())


@pytest.mark.parametrize(
    ("task", "name", "linears", "left_out"),
    [
        ("causal", "qwen3_moe", 8, "gate_up_proj (gate_proj, up_proj), down_proj"),
        ("encoder-decoder", "bart", 32, ""),
        ("vision", "siglip", 15, "attention.out_proj"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # what transformers and PEFT say of such models
def test_what_the_sweep_does(task, name, linears, left_out):
    outcome = check(task, name)
    assert (outcome.status, outcome.linears) == ("works", linears), outcome.detail
    assert left_out in outcome.left_out
    page = document({(task, name): outcome})
    assert f"| {name} | {linears} | works |" in page


def test_what_cannot_be_built_says_why():
    outcome = check("vision", "timm_wrapper")
    assert outcome.status == "not tiny"
    assert "timm" in outcome.detail
