"""The worked example in CONTRIBUTING.md: a router in two files, run as it stands there."""

from __future__ import annotations

import importlib.util
import inspect
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
from moelora_plugin.routers.modifiers import MODIFIERS
from moelora_plugin.types import LayerPlan, Rows


def contracts():
    """The functions that `test_router_contracts.py` runs over every router."""
    file = Path(__file__).with_name("test_router_contracts.py")
    spec = importlib.util.spec_from_file_location("router_contracts", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


ROUTER_CONTRACTS = contracts()
OF_A_CASE = [
    function
    for name, function in vars(ROUTER_CONTRACTS).items()
    if name.startswith("test_") and list(inspect.signature(function).parameters) == ["case"]
]
# Once for each router: compiling takes its time.
COMPILES = ("test_it_compiles_to_one_graph",)
TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILE, LINE = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture
def min_p(monkeypatch):
    """The router, registered by the example's own line."""
    module = types.ModuleType("moelora_plugin.routers.min_p")
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


@pytest.mark.parametrize("contract", OF_A_CASE, ids=lambda function: function.__name__)
def test_the_contracts_of_every_router_hold_for_it(min_p, contract):
    case = ROUTER_CONTRACTS.Case
    contract(case("min_p"))
    contract(case("min_p", {"ratio": 0.1}))
    if contract.__name__ not in COMPILES:
        for name, modifier in MODIFIERS.items():
            if name != "balance_bias":  # it acts on routers that rank experts
                contract(case("min_p", {}, {name: modifier.example}))


def test_its_options_are_held_to_the_contracts_too(min_p):
    ROUTER_CONTRACTS.test_options_are_keyword_only_and_an_unknown_one_is_named("min_p")
    ROUTER_CONTRACTS.test_every_router_says_what_it_is("min_p")


def test_the_contracts_are_found():
    assert len(OF_A_CASE) >= 14
