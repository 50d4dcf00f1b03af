"""Attention masks that come finished, (B, 1, S, all): the padding in them is padding as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_llama
from torch import Tensor, nn

from moelora_plugin import MoeLoraConfig

LENGTHS = (4, 7, 10)


def finished(padding: Tensor, kind: str) -> Tensor:
    """(B, 1, S, S) of a decoder's 2-D mask."""
    size = padding.shape[1]
    seen = torch.ones(size, size, dtype=torch.bool).tril()[None, None]
    seen = seen & padding.bool()[:, None, None]
    if kind == "bool":
        return seen
    least = torch.finfo(torch.float32).min if kind == "least" else -torch.inf
    # A row that sees nothing would be NaN.
    return torch.zeros(seen.shape).masked_fill(~seen, least)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["bool", "least"])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"router_input": "sequence"},
        {"router_input": "prompt"},
        {"router": "expert_choice"},
    ],
    ids=["sequence", "prompt", "expert_choice"],
)
def test_padding_is_told_from_a_finished_mask(
    fields: dict[str, Any], use_cache: bool, kind: str, side: str
) -> None:
    torch.manual_seed(0)
    config = MoeLoraConfig(
        num_experts=4, top_k=2, r=2, target_modules=["q_proj", "down_proj"], **fields
    )
    model = get_peft_model(tiny_llama(), config).eval()
    for name, parameter in model.named_parameters():
        if ".moelora_" in name:
            nn.init.normal_(parameter, std=0.3)
    rows = [torch.randint(3, 400, (length,)) for length in LENGTHS]
    ids = torch.full((len(rows), max(LENGTHS)), 2)
    padding = torch.zeros_like(ids)
    for n, row in enumerate(rows):
        place = slice(-len(row), None) if side == "left" else slice(len(row))
        ids[n, place], padding[n, place] = row, 1
    positions = (padding.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(
            ids, attention_mask=finished(padding, kind), position_ids=positions, use_cache=use_cache
        ).logits
        for n, row in enumerate(rows):
            alone = model(row[None]).logits[0]
            torch.testing.assert_close(logits[n][padding[n].bool()], alone, rtol=0, atol=1e-4)
