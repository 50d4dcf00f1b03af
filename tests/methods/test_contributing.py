"""The worked example in CONTRIBUTING.md: a router in two files, run as it stands there."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from preset_cases import adapted, grown, toy_batch

from moelora_plugin import MoeLoraConfig
from moelora_plugin.errors import ConfigError
from moelora_plugin.routers import ROUTERS
from moelora_plugin.types import LayerPlan, Rows

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILE, LINE = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture
def min_p(monkeypatch):
    """The router, registered by the example's own line."""
    module = types.ModuleType("min_p_of_contributing")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(FILE, "CONTRIBUTING.md", "exec"), module.__dict__)
    monkeypatch.setattr("moelora_plugin.routers.ROUTERS", ROUTERS)
    exec(LINE, {"ROUTERS": ROUTERS, "MinPRouter": module.MinPRouter})
    yield module.MinPRouter
    del ROUTERS["min_p"]


def test_by_hand(min_p):
    """Probabilities 0.5, 0.3, 0.15, 0.05; at ratio 0.5 the first two stay."""
    router = min_p(4, LayerPlan(4, 2, (2,) * 4, 8))
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    weights, ids = router.select(probs, probs, Rows(x=None))
    torch.testing.assert_close(weights, torch.tensor([[0.625, 0.375, 0.0, 0.0]]))
    assert ids is None


def test_it_goes_by_its_name_with_its_options(min_p):
    model = adapted("moe_lora", router="min_p", router_kwargs={"ratio": 0.9})
    model(**toy_batch()).loss.backward()
    with pytest.raises(ConfigError, match="router_kwargs has no key 'rati'; did you mean 'ratio'"):
        adapted("moe_lora", router="min_p", router_kwargs={"rati": 0.9})
    with pytest.raises(ConfigError, match=r"router_kwargs\['ratio'\]=2 must be"):
        adapted("moe_lora", router="min_p", router_kwargs={"ratio": 2})


def test_it_goes_by_its_dotted_path(min_p):
    path = f"{min_p.__module__}.MinPRouter"
    assert MoeLoraConfig(router=path).router == path
    by_name, by_path = (grown("moe_lora", router=name).eval() for name in ("min_p", path))
    with torch.no_grad():
        assert torch.equal(by_name(**toy_batch()).logits, by_path(**toy_batch()).logits)
