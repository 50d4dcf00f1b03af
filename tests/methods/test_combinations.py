"""Parts that do not fit each other are refused when a configuration is made, not in a forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_llama

from moelora_plugin import MoeLoraConfig
from moelora_plugin.call import routing_ids
from moelora_plugin.errors import ConfigError
from moelora_plugin.experts import EXPERTS
from moelora_plugin.initialization import INITIALIZATIONS
from moelora_plugin.layers.sites import SITES
from moelora_plugin.losses import LOSSES
from moelora_plugin.routers import ROUTERS
from moelora_plugin.routers.inputs import INPUTS
from moelora_plugin.routers.modifiers import MODIFIERS
from moelora_plugin.routers.scores import SCORES
from moelora_plugin.scaling import SCALES

MODIFIER_VALUES = {
    **{"temperature": 0.5, "jitter": 0.1, "noise": 0.1, "expert_dropout": 0.1},
    **{"capacity": 1.25, "balance_bias": 0.1},
}
AXES: Mapping[str, Mapping[str, Any]] = {
    "router_input": {name: name for name in INPUTS},
    "router_score": {name: name for name in SCORES},
    "router": {name: name for name in ROUTERS},
    "expert": {name: name for name in EXPERTS},
    "site": {name: name for name in SITES},
    "aux_losses": {name: {name: 0.1} for name in LOSSES},
    "router_modifiers": {name: {name: MODIFIER_VALUES[name]} for name in MODIFIERS},
    "init": {name: name for name in INITIALIZATIONS if name != "adapters"},  # needs folders
    "universal_expert": {name: name for name in ("one", "complement")},
    "scale": {name: name for name in SCALES},
    "gate_rescale": {name: name for name in ("sqrt", "exact")},
}
IDS = torch.arange(3, 19).view(2, 8)
PATHS = {"init_kwargs": {"paths": ["a", "b", "c", "d"]}}  # which nobody opens
SMALL = {"num_experts": 4, "top_k": 1, "lora_alpha": 2, "lora_dropout": 0.0}


def pairs() -> Iterator[Any]:
    """Every two choices on two axes, with the defaults on the others."""
    for (one, ones), (other, others) in combinations(AXES.items(), 2):
        for name in ones:
            for second in others:
                yield pytest.param({one: ones[name], other: others[second]}, id=f"{name}-{second}")


@pytest.mark.slow
@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("keys", list(pairs()))
def test_what_a_configuration_takes_runs(keys: dict[str, Any], r: int) -> None:
    targets = ["gate_proj", "up_proj"] if keys.get("site") == "block" else ["q_proj", "v_proj"]
    try:
        config = MoeLoraConfig(**SMALL, r=r, target_modules=targets, **keys)
    except ConfigError:
        return
    # Widths that 4 experts and 5 divide, as the universal one makes them.
    model = get_peft_model(tiny_llama(vocab_size=32, hidden=80, layers=1), config).train()
    with routing_ids(model, task_id=[0, 1], cluster_id=[1, 0]):
        model(input_ids=IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"aux_losses": {"lambda_sparsity": 0.1}}, "set router to 'sparsegen'"),
        ({"router_input": "cluster"}, "set router_input to 'token'"),
        ({"router_input": "none", "router_score": "static", "router": "threshold"}, "router_input"),
        ({"router_score": "self_norm", "expert": "shared_a"}, "set expert='lora'"),
        ({"aux_losses": {"contrastive": 0.1}, "site": "block"}, "set site to 'linear'"),
        ({"aux_losses": {"orthogonal": 0.1}, "site": "layer"}, "site to 'linear'"),
        ({"init": "segments", "expert": "shared_b"}, "expert to 'lora', or init to 'kaiming'"),
        ({"init": "milora", "expert": "dora", "site": "block"}, "expert to 'lora', or init to"),
        ({"init": "adapters", "expert": "tree", **PATHS}, "set expert to 'lora'"),
        ({"init": "adapters", "expert": "vector", **PATHS}, "set expert to 'lora'"),
        ({"init": "adapters", "expert": "shared_a", **PATHS}, "set expert to 'lora'"),
        ({"init": "adapters", "expert": "block_diagonal", **PATHS}, "set expert to 'lora'"),
    ],
)
def test_what_does_not_fit_is_named(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        MoeLoraConfig(**SMALL, r=2, **keys)
