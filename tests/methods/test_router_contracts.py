"""What holds for every router, alone and with every modifier, whatever the dicts hold.

A new entry of `ROUTERS` or `MODIFIERS` is tested here without a test of its own. What it is
excepted from, it declares as a class attribute (see `Router` and `Modifier`).
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import pickle
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from route_rows import make_modifiers, make_router, route_rows
from tiny import enable_checkpointing, tiny_llama
from torch.utils.checkpoint import checkpoint

from moelora_plugin import MoeLoraConfig
from moelora_plugin.errors import ConfigError
from moelora_plugin.lookup import with_options
from moelora_plugin.model import routed_layers
from moelora_plugin.routers import ROUTERS, Router
from moelora_plugin.routers.modifiers import MODIFIERS
from moelora_plugin.types import LayerPlan, Routing

EXPERTS, WIDTH, BATCH, LENGTH = 5, 6, 3, 8
ROWS = BATCH * LENGTH

DTYPES = (torch.bfloat16, torch.float32, torch.float64)

# The same sums in another order, in float64.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}

# Forms of a router that its options make different enough to hold them to everything as well.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "topk": [{"renormalize": False}, {"weight": "one"}, {"by": "magnitude"}],
    "top_p": [{"p": 0.5, "renormalize": True}],
    "threshold": [{"max_threshold": 0.6}],
    "sigmoid": [
        {"max_threshold": 0.5},
        {"max_threshold": 0.5, "straight_through": True},
        {"normalize": True, "relaxed": True},
    ],
    "hard": [{"straight_through": True}],
    "expert_choice": [{"capacity_factor": 1.3}],
    "sinkhorn": [{"renormalize": True}],
}


def top_k_of(name: str) -> int:
    """2, or 1 for a router that takes no more."""
    try:
        make_router(name, EXPERTS, 2)
    except ConfigError:
        return 1
    return 2


@dataclass(frozen=True)
class Case:
    """A router with options and modifiers."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = [f"{key}={value}" for key, value in self.options.items()]
        return "-".join([self.name, *options, *self.values])

    def make(self, experts: int = EXPERTS) -> Routers:
        torch.manual_seed(0)
        top_k = top_k_of(self.name)
        router = make_router(self.name, experts, top_k, WIDTH, **self.options)
        for parameter in router.parameters():  # zeros would hide what they do
            torch.nn.init.normal_(parameter)
        weight = torch.randn(experts, WIDTH, dtype=torch.float64, requires_grad=True)
        return Routers(router, make_modifiers(experts, top_k, **self.values), weight)


@dataclass
class Routers:
    """What a layer has."""

    router: Router
    modifiers: Any
    weight: torch.Tensor

    @property
    def declared(self) -> list[Any]:
        """What declares exceptions."""
        return [self.router, *self.modifiers.modifiers]

    @property
    def random(self) -> bool:
        return any(part.random for part in self.declared)

    def mixes_rows(self, training: bool) -> bool:
        """Whether rows depend on each other; a router that balances has them do so in training."""
        router = self.router.mixes_rows and (training or not self.router.balances)
        return router or self.modifiers.mixes_rows

    def train(self, mode: bool = True) -> Routers:
        self.router.train(mode)
        self.modifiers.train(mode)
        return self

    def route(self, x: torch.Tensor, real=None, batch: int = BATCH, seed: int = 1) -> Routing:
        torch.manual_seed(seed)
        return self.forward(x, real, batch)

    def forward(self, x: torch.Tensor, real=None, batch: int = BATCH) -> Routing:
        return route_rows(self.router, x, self.weight, self.modifiers, real, batch)


def rows() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


ALONE = [Case(name, options) for name in ROUTERS for options in [{}, *VARIANTS.get(name, [])]]
MODIFIED = [
    Case(name, {}, {modifier: MODIFIERS[modifier].example})
    for name, router in ROUTERS.items()
    for modifier in MODIFIERS
    if router.by_preference or modifier != "balance_bias"
]
each_case = pytest.mark.parametrize("case", [*ALONE, *MODIFIED], ids=str)
each_router = pytest.mark.parametrize("case", ALONE, ids=str)
# Evaluation and training, in a loop where a parameter would make thousands of tests.
MODES = (False, True)


def assert_same(found: Routing, expected: Routing, index=slice(None), exact: bool = True) -> None:
    for one, other in ((found.weights, expected.weights), (found.probs, expected.probs)):
        if exact:
            assert torch.equal(one[index], other[index])
        else:
            torch.testing.assert_close(one[index], other[index], **CLOSE)


def differs(one: Routing, other: Routing) -> bool:
    return not (torch.equal(one.weights, other.weights) and torch.equal(one.probs, other.probs))


@each_case
def test_shapes_and_dtypes(case):
    for training, dtype in itertools.product(MODES, DTYPES):
        parts = case.make().train(training)
        parts.router.to(dtype)
        parts.weight = parts.weight.to(dtype)
        routing = parts.route(rows().to(dtype))
        wide = torch.promote_types(dtype, torch.float32)
        assert (routing.probs.dtype, routing.weights.dtype) == (wide, wide)
        for tensor in (routing.logits, routing.probs, routing.weights):
            assert tensor.shape == (ROWS, EXPERTS)
            assert tensor.isfinite().all()
        for name, tensor in routing.extras.items():
            assert tensor.shape[0] == ROWS, name
            assert tensor.isfinite().all(), name
        if routing.expert_ids is not None:
            assert routing.expert_ids.shape[0] == ROWS
            assert routing.expert_ids.dtype == torch.long


@each_case
def test_gates_are_zero_where_not_selected_and_nowhere_negative(case):
    for training in MODES:
        routing = case.make().train(training).route(rows())
        assert (routing.weights >= 0).all()
        assert routing.weights.any()
        if routing.expert_ids is not None:
            selected = torch.zeros(ROWS, EXPERTS).scatter(1, routing.expert_ids, 1.0).bool()
            assert not routing.weights[~selected].any()


@each_case
def test_gradients_reach_the_gate_and_the_router_and_nothing_else(case):
    parts = case.make().train()
    x = rows()
    routing = parts.route(x)
    if not parts.router.differentiable:
        assert not routing.weights.requires_grad
        assert routing.probs.requires_grad  # for a balance loss
        return
    (routing.weights * torch.arange(1, EXPERTS + 1)).square().sum().backward()
    trained = [p for p in parts.router.parameters() if p.requires_grad]
    for tensor in (parts.weight, *trained):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()
    assert not any(parameter.requires_grad for parameter in parts.modifiers.parameters())


@each_case
def test_closed_gates_learn_nothing_where_the_number_of_experts_is_declared(case):
    for training in MODES:
        parts = case.make().train(training)
        routing = parts.route(rows())
        closed = routing.weights == 0
        if parts.router.experts_per_row is None or not routing.weights.requires_grad:
            continue
        assert (~closed).sum() <= (parts.router.experts_per_row + 0.5) * ROWS  # rounded per expert
        learned = [p for p in (parts.weight, *parts.router.parameters()) if p.requires_grad]
        factors = torch.randn(ROWS, EXPERTS, dtype=torch.float64)
        of_closed = (routing.weights * closed * factors).sum()
        grads = torch.autograd.grad(of_closed, learned, allow_unused=True)
        assert not any(grad is not None and grad.any() for grad in grads)


@each_case
def test_experts_may_change_places(case):
    parts = case.make().train(False)
    x, order = rows(), torch.randperm(EXPERTS)
    expected = parts.route(x)
    with torch.no_grad():
        parts.weight.copy_(parts.weight[order])
    found = parts.route(x)
    torch.testing.assert_close(found.weights, expected.weights[:, order], **CLOSE)
    torch.testing.assert_close(found.probs, expected.probs[:, order], **CLOSE)


@each_case
def test_a_row_is_routed_by_itself(case):
    """Its place, its company and the size of the batch make no difference."""
    parts, x = case.make().train(False), rows()
    together = parts.route(x)
    sequences = [parts.route(x[i : i + LENGTH], batch=1) for i in range(0, ROWS, LENGTH)]
    for name in ("weights", "probs"):
        apart = torch.cat([getattr(routing, name) for routing in sequences])
        torch.testing.assert_close(apart, getattr(together, name), **CLOSE)
    if parts.mixes_rows(training=False):
        return
    order = torch.randperm(ROWS)
    torch.testing.assert_close(parts.route(x[order]).weights, together.weights[order], **CLOSE)
    single = torch.cat([parts.route(row, batch=1).weights for row in x.split(1)])
    torch.testing.assert_close(single, together.weights, **CLOSE)


@each_case
def test_what_stands_in_padding_makes_no_difference(case):
    for training in MODES:
        parts, x = case.make().train(training), rows()
        real = torch.ones(BATCH, LENGTH, dtype=torch.bool)
        real[0, :3] = real[1, 5:] = False
        real = real.flatten()
        expected = parts.route(x, real)
        x[~real] = 100 * torch.randn(int((~real).sum()), WIDTH, dtype=torch.float64)
        assert_same(parts.route(x, real), expected, real, exact=False)


@each_case
def test_the_length_of_padding_makes_no_difference(case):
    for side in ("left", "right"):
        parts, x = case.make().train(False), rows()
        expected = parts.route(x, torch.ones(ROWS, dtype=torch.bool))
        pads = torch.randn(BATCH, 4, WIDTH, dtype=torch.float64)
        sequences = x.view(BATCH, LENGTH, WIDTH)
        longer = torch.cat([pads, sequences] if side == "left" else [sequences, pads], 1)
        real = torch.zeros(BATCH, LENGTH + 4, dtype=torch.bool)
        real[:, 4 if side == "left" else 0 :][:, :LENGTH] = True
        real = real.flatten()
        found = parts.route(longer.flatten(0, 1), real)
        torch.testing.assert_close(found.weights[real], expected.weights, **CLOSE)


@each_case
def test_a_row_with_nan_touches_no_other(case):
    for training in MODES:
        parts, x = case.make().train(training), rows()
        if parts.mixes_rows(training):
            continue
        expected = parts.route(x)
        x[4, 1] = math.nan
        others = torch.arange(ROWS) != 4
        found = parts.route(x)
        assert_same(found, expected, others)
        assert found.probs[4].isnan().any()
        assert found.weights[4].isnan().any() or not parts.router.differentiable


@each_case
def test_the_seed_decides(case):
    for training in MODES:
        parts, x = case.make().train(training), rows()
        first = parts.route(x)
        assert_same(parts.route(x), first)
        assert differs(parts.route(x, seed=2), first) == (training and parts.random)


@each_case
def test_training_differs_from_evaluation_only_where_declared(case):
    parts, x = case.make(), rows()
    differ = differs(parts.train().route(x), parts.train(False).route(x))
    assert differ == (parts.random or parts.router.balances)


@each_case
def test_copies_and_pickles_route_alike(case):
    for training in MODES:
        parts, x = case.make().train(training), rows()
        expected = parts.route(x)
        for twin in (copy.deepcopy(parts.router), pickle.loads(pickle.dumps(parts.router))):
            assert_same(
                Routers(twin, copy.deepcopy(parts.modifiers), parts.weight).route(x), expected
            )
        again = pickle.loads(pickle.dumps(parts.modifiers))
        assert_same(Routers(parts.router, again, parts.weight).route(x), expected)


@each_case
def test_a_recomputed_forward_is_the_same_and_changes_no_state(case):
    parts = case.make().train()
    parts.modifiers.before_call()
    x = rows().requires_grad_()

    def run(x):
        return parts.route(x).weights

    state = copy.deepcopy(parts.modifiers.state_dict())
    plain = run(x)
    weighting = torch.randn_like(plain)
    for reentrant in (False, True):
        recomputed = checkpoint(run, x, use_reentrant=reentrant)
        assert torch.equal(plain, recomputed)
        if plain.requires_grad:
            expected = backward_to(x, (run(x) * weighting).sum())
            assert torch.equal(backward_to(x, (recomputed * weighting).sum()), expected)
    for name, tensor in parts.modifiers.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def backward_to(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """The gradient that x receives."""
    x.grad = None
    total.backward()
    return x.grad


@pytest.mark.parametrize(
    "case",
    [
        *map(Case, ROUTERS),
        *(Case("topk", {}, {name: MODIFIERS[name].example}) for name in MODIFIERS),
    ],
    ids=str,
)
def test_it_compiles_to_one_graph(case):
    torch._dynamo.reset()
    parts, x = case.make(), rows()
    real = torch.rand(ROWS) < 0.8
    compiled = torch.compile(parts.forward, fullgraph=True, backend="eager")
    for training in (False, True):
        expected = parts.train(training).route(x, real)
        torch.manual_seed(1)
        assert_same(compiled(x, real), expected, exact=False)


@each_case
def test_one_expert(case):
    for training in MODES:
        parts = case.make(experts=1).train(training)
        routing = parts.route(rows())
        assert routing.weights.shape == (ROWS, 1)
        assert routing.weights.isfinite().all()
        fixed = parts.router.fixed_weights()
        if (
            fixed is not None
            and not parts.modifiers.mixes_rows
            and "expert_dropout" not in case.values
        ):
            assert torch.equal(routing.weights, fixed.double().expand(ROWS, 1))


@each_router
def test_autocast_leaves_the_probabilities_wide(case):
    parts = case.make().train()
    parts.router.float()
    parts.weight = parts.weight.float()
    with torch.autocast("cpu", torch.bfloat16):
        routing = parts.route(rows().float())
    assert routing.logits.dtype == torch.bfloat16
    assert (routing.probs.dtype, routing.weights.dtype) == (torch.float32, torch.float32)


@each_router
def test_parameters_are_direct(case):
    """PEFT strips the adapter's name only from `moelora_router.<adapter>.<parameter>`."""
    state = case.make().router.state_dict()
    assert not [name for name in state if "." in name]
    # So are tensors of modifiers, below `moelora_modifiers.<adapter>`.
    modifiers = make_modifiers(EXPERTS, **{n: m.example for n, m in MODIFIERS.items()})
    assert not [name for name in modifiers.state_dict() if "." in name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "case",
    [case for case in ALONE if case.name == "topk" or case.make().router.state_dict()],
    ids=str,
)
def test_an_adapter_is_saved_and_loaded_to_the_bit(case, dtype, tmp_path):
    """After a training step with activation checkpointing, in which everything trained."""
    config = MoeLoraConfig(
        r=2,
        num_experts=4,
        top_k=2,
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
        router=case.name,
        router_kwargs=case.options,
    )
    model = get_peft_model(tiny_llama(layers=1).to(dtype), config).train()
    for layer in routed_layers(model).values():
        for _, b in layer.expert_weights():
            b.normal_()
    enable_checkpointing(model.get_base_model())
    ids = torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    for layer in routed_layers(model).values():
        for parameter in layer.moelora_router.parameters():
            assert not parameter.requires_grad or parameter.grad.isfinite().all()
    optimizer.step()
    model.save_pretrained(tmp_path)
    expected = model.eval()(input_ids=ids, attention_mask=mask).logits
    for low_cpu_mem_usage in (False, True):
        if low_cpu_mem_usage and dtype == torch.bfloat16:
            continue  # PEFT rounds what it loads to the base's dtype on this path
        base = tiny_llama(layers=1).to(dtype)
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        state = model.state_dict()
        assert state.keys() == loaded.state_dict().keys()
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, state[name]), name
        # Not to the bit: how a product with one row is rounded depends on where its memory starts.
        found = loaded.eval()(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ROUTERS)
def test_options_are_keyword_only_and_an_unknown_one_is_named(name):
    router = ROUTERS[name]
    kinds = [p.kind for p in inspect.signature(router).parameters.values()]
    assert set(kinds[2:]) <= {inspect.Parameter.KEYWORD_ONLY}
    plan = LayerPlan(EXPERTS, top_k_of(name), (1,) * EXPERTS, 1.0)
    with pytest.raises(ConfigError, match=r"router_kwargs.*'speed'"):
        with_options("router_kwargs", router, {"speed": 1}, WIDTH, plan)


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_says_what_it_is(name):
    assert ROUTERS[name].__doc__ != Router.__doc__
    assert ROUTERS[name].__module__ == f"moelora_plugin.routers.{name}"


@pytest.mark.parametrize("name", MODIFIERS)
def test_every_modifier_says_what_it_is(name):
    assert MODIFIERS[name].__doc__
    assert MODIFIERS[name].__module__ == f"moelora_plugin.routers.modifiers.{name}"
