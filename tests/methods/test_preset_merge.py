"""Each preset merges exactly where it says so, and refuses otherwise."""

from __future__ import annotations

import copy

import pytest
import torch
from preset_cases import for_one_id, grown, ids_of, toy_batch

from moelora_plugin import PRESETS
from moelora_plugin.errors import ExportError
from moelora_plugin.layers import MoeLoraLinear, RoutedLayer
from moelora_plugin.model import moelora_layers

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


@pytest.mark.parametrize("name", REFUSED)
def test_fixed_gates_fold_where_it_says_mean_gate(name):
    """What `moelora export --strategy mean-gate` asks of each layer."""
    model = grown(name).eval()

    def uniform(layer: RoutedLayer) -> torch.Tensor:
        experts = layer.moelora_router["default"].plan.num_experts
        return torch.full((experts,), 1 / experts)

    def fold() -> None:
        for layer in moelora_layers(model).values():
            source = layer.moelora_gate_source.get("default")
            if source is None:
                gates = uniform(layer)
            else:
                gates = source.mean_weights(layer, "default", uniform)
            layer.static_update(weights_E=gates)

    if PRESETS[name].merge == "mean-gate":
        fold()
    else:
        with pytest.raises(ExportError):
            fold()
