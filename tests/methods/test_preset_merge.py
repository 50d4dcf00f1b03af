"""Each preset merges exactly where it says so, and refuses otherwise."""

from __future__ import annotations

import copy

import pytest
import torch
from preset_cases import for_one_id, grown, ids_of, toy_batch
from transformers import BatchEncoding

from moelora_plugin import PRESETS
from moelora_plugin.errors import ExportError
from moelora_plugin.export.merged import merge_mean_gate
from moelora_plugin.layers import MoeLoraLinear

EXACT = [name for name, preset in PRESETS.items() if preset.merge in ("exact", "per task")]
REFUSED = [name for name in PRESETS if name not in EXACT]


def logits(model, **ids) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=toy_batch()["input_ids"], **ids).logits


@pytest.mark.parametrize("name", EXACT)
def test_merged_it_gives_the_same_logits_without_the_adapter(name):
    assert bool(ids_of(name)) == (PRESETS[name].merge == "per task")
    model = grown(name).double().eval()
    with for_one_id(name, model):
        expected = logits(model)
        merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
        assert not [m for m in merged.modules() if isinstance(m, MoeLoraLinear)]
        # (W + s B A) x instead of W x + s B (A x): other roundings in float64, over two layers.
        torch.testing.assert_close(logits(merged), expected, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(expected, logits(model.unload()))


@pytest.mark.parametrize("name", [name for name in EXACT if PRESETS[name].merge == "per task"])
def test_each_task_has_its_own_merge_and_none_is_refused(name):
    model = grown(name).double().eval()
    with pytest.raises(ExportError):
        copy.deepcopy(model).merge_and_unload()
    first, second = (
        logits(model, **{key: torch.full((8,), i) for key in ids_of(name)}) for i in (0, 1)
    )
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("name", REFUSED)
def test_what_follows_the_input_is_refused(name):
    model = grown(name).eval()
    expected = logits(model)
    with pytest.raises(ExportError):
        model.merge_and_unload()
    assert torch.equal(logits(model), expected)  # nothing was touched


def numbers(text: str, **_: object) -> BatchEncoding:
    """A tokenizer for a model whose words are numbers."""
    return BatchEncoding({"input_ids": torch.tensor([[int(word) for word in text.split()]])})


@pytest.mark.parametrize("name", REFUSED)
def test_mean_gates_fold_where_it_says_so_and_are_refused_before_any_text_is_read(name):
    model = grown(name).eval()
    if PRESETS[name].merge == "mean-gate":
        merge_mean_gate(model, numbers, ["3 4 5 6", "7 3 8"])
    else:
        with pytest.raises(ExportError):
            merge_mean_gate(model, None, None)
