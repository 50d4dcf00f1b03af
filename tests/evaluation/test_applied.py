"""Adapters that are loaded and do nothing."""

from __future__ import annotations

import pytest
from peft import PeftModel
from tiny import tiny_llama

from moelora_plugin.errors import AdapterError
from moelora_plugin.evaluation.applied import require_applied
from moelora_plugin.model import moelora_layers

IDS = [0, 10, 20, 30, 40]


def test_an_adapter_at_work_passes(adapter: PeftModel) -> None:
    require_applied(adapter, IDS)


def test_experts_that_are_zero_are_legal(zero_adapter: PeftModel) -> None:
    require_applied(zero_adapter, IDS)


def test_a_model_without_an_adapter_passes() -> None:
    require_applied(tiny_llama(), IDS)


def test_layers_in_a_bare_model_pass(adapter: PeftModel) -> None:
    require_applied(adapter.get_base_model(), IDS)


def test_an_adapter_that_is_switched_off_is_refused(adapter: PeftModel) -> None:
    adapter.base_model.disable_adapter_layers()
    with pytest.raises(
        AdapterError, match=r"trained experts but the logits are exactly the base's"
    ):
        require_applied(adapter, IDS)


def test_some_zero_experts_may_be_the_ones_selected(adapter: PeftModel) -> None:
    for layer in moelora_layers(adapter).values():
        layer.expert_weights()[0][1].zero_()
    adapter.base_model.disable_adapter_layers()
    require_applied(adapter, IDS)
