"""Each modifier: an example by hand, the slow oracle's answer, and what its state survives."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from route_rows import make_modifiers, make_router, route_rows
from tiny import tiny_llama

from moelora_plugin import MoeLoraConfig
from moelora_plugin.errors import ConfigError
from moelora_plugin.model import routed_layers
from moelora_plugin.ops.reference import capacity_loop, hard_loop
from moelora_plugin.routers import ROUTERS


def doubles(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# temperature, jitter, noise


def test_temperature_by_hand():
    logits = doubles([0.0, math.log(3)])
    routed = route_rows(
        make_router("softmax", 2), logits, modifiers=make_modifiers(2, temperature=0.5)
    )
    torch.testing.assert_close(routed.weights, doubles([0.1, 0.9]))  # 1 to 3^2
    assert torch.equal(routed.logits, 2 * logits)


def test_jitter_multiplies_each_feature_by_its_own_noise():
    x, weight = torch.ones(400, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    modifiers = make_modifiers(3, jitter=0.1)
    factors = route_rows(make_router("relu", 3), x, weight, modifiers).weights
    assert factors.min() >= 0.9
    assert factors.max() <= 1.1
    # 1,200 draws from a range of 0.2: the middle to 0.2 / sqrt(12 * 1200) * 4, the ends closer.
    assert abs(factors.mean() - 1) < 0.007
    assert factors.max() - factors.min() > 0.19
    assert len(factors.unique()) == factors.numel()
    assert torch.equal(route_rows(make_router("relu", 3), x, weight, modifiers.eval()).weights, x)


def test_noise_has_its_standard_deviation():
    logits = torch.zeros(1000, 3, dtype=torch.float64)
    modifiers = make_modifiers(3, noise=0.5)
    noise = route_rows(make_router("softmax", 3), logits, modifiers=modifiers).logits
    # 3,000 draws: the deviation is known to 1 / sqrt(6000), the mean to 0.5 / sqrt(3000); 4 of each
    assert abs(noise.std() / 0.5 - 1) < 0.052
    assert abs(noise.mean()) < 0.037
    routed = route_rows(make_router("softmax", 3), logits, modifiers=modifiers.eval())
    assert torch.equal(routed.logits, logits)


def test_modifiers_act_in_the_order_of_the_configuration():
    logits = torch.zeros(1, 2, dtype=torch.float64)
    found = []
    for values in ({"noise": 1.0, "temperature": 0.5}, {"temperature": 0.5, "noise": 1.0}):
        torch.manual_seed(0)
        modifiers = make_modifiers(2, **values)
        found.append(route_rows(make_router("softmax", 2), logits, modifiers=modifiers).logits)
    assert torch.equal(found[0], 2 * found[1])


# expert_dropout


def test_expert_dropout_leaves_out_a_share_and_keeps_the_expectation():
    logits = torch.zeros(3000, 4, dtype=torch.float64)
    modifiers = make_modifiers(4, expert_dropout=0.25)
    router = make_router("softmax", 4)
    weights = route_rows(router, logits, modifiers=modifiers).weights
    assert set(weights.unique().tolist()) == {0.0, 0.25 / 0.75}
    # 12,000 draws; all four of a row go in 0.4 % of the rows, where one stays: + 0.1 %
    assert abs((weights == 0).double().mean() - 0.249) < 4 * math.sqrt(0.25 * 0.75 / 12000)
    routed = route_rows(router, logits, modifiers=modifiers.eval())
    assert torch.equal(routed.weights, torch.full_like(logits, 0.25))


@pytest.mark.parametrize("name", ["topk", "hard", "top_p", "threshold", "sinkhorn", "noisy_topk"])
def test_a_row_that_would_lose_all_experts_keeps_the_likeliest(name):
    torch.manual_seed(0)
    logits = torch.randn(50, 3, dtype=torch.float64)
    router = make_router(name, 3, top_k=1 if name == "hard" else 2)
    routed = route_rows(router, logits, modifiers=make_modifiers(3, expert_dropout=0.999999))
    best = routed.probs.argmax(1)
    if name != "noisy_topk":  # whose noise decides which is likeliest
        assert torch.equal(best, logits.argmax(1))
    # One survivor in a million has company.
    assert torch.equal(routed.weights != 0, torch.nn.functional.one_hot(best, 3).bool())


@pytest.mark.parametrize("options", [{}, {"weight": "one"}, {"weight": "one", "by": "magnitude"}])
def test_a_dropped_expert_is_not_selected_even_by_its_bias(options):
    torch.manual_seed(0)
    logits = torch.randn(200, 4, dtype=torch.float64)
    modifiers = make_modifiers(4, expert_dropout=0.5, balance_bias=1.0)
    modifiers.balance_moves[0] = 1000  # all rows would select expert 0
    routed = route_rows(make_router("topk", 4, **options), logits, modifiers=modifiers)
    dropped = routed.probs == 0
    assert not routed.weights[dropped].any()
    assert 50 < dropped[:, 0].sum() < 150
    assert (routed.weights[~dropped[:, 0], 0] > 0).all()
    # Two of those that stayed, or the only one.
    expected = (~dropped).sum(1).clamp(max=2)
    assert torch.equal((routed.weights != 0).sum(1), expected)


def test_an_expert_whose_probability_underflows_has_not_dropped_out():
    router = make_router("topk", 3, weight="one", by="magnitude")
    modifiers = make_modifiers(3, expert_dropout=1e-12)  # on, and never does anything
    routed = route_rows(router, doubles([3e3, -9e2, 8e2]), modifiers=modifiers)
    assert (routed.probs > 0).tolist() == [[True, False, False]]
    assert routed.weights.tolist() == [[1, 1, 0]]


# capacity


def staged(router, x):
    """Without an effect of modifiers, but stage by stage as with one, to the bit."""
    return route_rows(router, x, modifiers=make_modifiers(router.plan.num_experts, temperature=1.0))


def test_capacity_by_hand():
    """Expert 0 is wanted by rows 0, 1 and 3; it takes two. Row 3 keeps its second expert."""
    logits = doubles([2, 1, 0], [2, 0, 1], [0, 2, 1], [2, 1, 0])
    router = make_router("topk", 3)
    full = staged(router, logits).weights
    kept = route_rows(router, logits, modifiers=make_modifiers(3, capacity=2)).weights
    expected = full.clone()
    expected[3, 0] = 0  # the third row for expert 0
    expected[3, 1] = 0  # and for expert 1
    assert torch.equal(kept, expected)


def test_capacity_by_factor_rounds_up_what_an_even_spread_needs():
    logits = doubles([1, 0], [1, 0], [1, 0])
    router = make_router("topk", 2, top_k=1)
    modifiers = make_modifiers(2, top_k=1, capacity={"factor": 1.0})  # 1 * 1 * 3 / 2
    assert route_rows(router, logits, modifiers=modifiers).weights[:, 0].tolist() == [1, 1, 0]


@pytest.mark.parametrize("value", [3, {"tokens": 3}, {"factor": 1.0}])
@pytest.mark.parametrize("padded", [False, True])
def test_capacity_agrees_with_the_oracle(value, padded):
    torch.manual_seed(0)
    x = torch.randn(24, 4, dtype=torch.float64, requires_grad=True)
    real = torch.rand(24) < 0.7 if padded else torch.ones(24, dtype=torch.bool)
    router = make_router("topk", 4)
    found = route_rows(
        router, x, modifiers=make_modifiers(4, capacity=value), real=real, batch=2
    ).weights
    counts = real.view(2, 12).sum(1).tolist()
    capacities = [math.ceil(n * 2 / 4) for n in counts] if "factor" in str(value) else [3, 3]
    expected = capacity_loop(staged(router, x).weights, capacities, real)
    assert torch.equal(found[real], expected[real])
    assert (found[real] != 0).sum() < 2 * sum(counts)  # some overflowed
    weighting = torch.randn_like(found) * real.unsqueeze(1)
    ours, theirs = (torch.autograd.grad((weighting * g).sum(), x)[0] for g in (found, expected))
    assert torch.equal(ours, theirs)


# balance_bias


def test_balance_bias_moves_against_the_load_before_the_next_call():
    logits = doubles([3, 2, 1, 0], [3, 2, 0, 1], [3, 0, 2, 1], [3, 1, 2, 0])  # loads 4, 2, 2, 0
    modifiers, router = make_modifiers(4, balance_bias=0.01), make_router("topk", 4)
    plain = staged(router, logits)
    for expected in ([0, 0, 0, 0], [-1, 0, 0, 1], [-2, 0, 0, 2]):
        modifiers.before_call()
        assert modifiers.balance_moves.tolist() == expected
        routed = route_rows(router, logits, modifiers=modifiers)
        assert torch.equal(routed.weights, plain.weights)  # a bias too small to matter
        assert modifiers.balance_moves.tolist() == expected  # which a forward does not change


def test_balance_bias_acts_on_the_selection_alone():
    logits = doubles([3, 2, 1, 0])
    modifiers = make_modifiers(4, balance_bias=0.5)
    modifiers.balance_moves.copy_(torch.tensor([-5, 0, 0, 0]))  # 3 - 2.5 is last but one
    routed = route_rows(make_router("topk", 4), logits, modifiers=modifiers)
    probs = logits.softmax(-1)
    assert torch.equal(routed.probs, probs)
    expected = torch.zeros(1, 4, dtype=torch.float64)
    expected[0, 1:3] = probs[0, 1:3] / probs[0, 1:3].sum()
    torch.testing.assert_close(routed.weights, expected)


@pytest.mark.parametrize("name", [name for name, router in ROUTERS.items() if router.by_preference])
def test_balance_bias_brings_an_expert_in_whatever_the_router(name):
    torch.manual_seed(0)
    router = make_router(name, 4, top_k=1 if name == "hard" else 2).eval()
    modifiers = make_modifiers(4, balance_bias=0.5).eval()
    logits = torch.randn(30, 4, dtype=torch.float64)
    plain = route_rows(router, logits, modifiers=modifiers)
    modifiers.balance_moves[2] = 1000
    moved = route_rows(router, logits, modifiers=modifiers)
    assert torch.equal(moved.probs, plain.probs)
    assert not (plain.weights[:, 2] > 0).all()
    assert (moved.weights[:, 2] > 0).all()


def test_flylora_s_selection_by_hand():
    """Top-k of |y + d|, gates 1: y = (-3, 1, 0.5), d = (2.8, 0, 0) leaves 0.2, 1, 0.5."""
    modifiers = make_modifiers(3, balance_bias=0.1)
    modifiers.balance_moves.copy_(torch.tensor([28, 0, 0]))
    router = make_router("topk", 3, weight="one", by="magnitude")
    y = torch.randn(40, 3, dtype=torch.float64)
    y[0] = torch.tensor([-3.0, 1.0, 0.5])
    found = route_rows(router, y, modifiers=modifiers).weights
    assert found[0].tolist() == [0, 1, 1]
    d = torch.tensor([2.8, 0, 0], dtype=torch.float64)
    assert torch.equal(found, hard_loop((y + d).abs(), 2))


def test_balance_bias_evens_out_the_load():
    torch.manual_seed(0)
    logits = torch.randn(500, 4, dtype=torch.float64)
    logits[:, 0] += 2
    modifiers, router = make_modifiers(4, balance_bias=0.05), make_router("topk", 4)
    loads = []
    for _ in range(100):
        modifiers.before_call()
        routed = route_rows(router, logits, modifiers=modifiers)
        loads.append((routed.weights > 0).sum(0))
    assert loads[0][0] > 450  # of 500, where 250 is even
    # 0.05 up or down moves a tenth of the rows at most.
    assert (loads[-1] - 250).abs().max() < 30


def test_balance_bias_counts_real_rows_of_training_with_gradients_only():
    logits = doubles([1, 0], [1, 0], [0, 1])
    router = make_router("topk", 2, top_k=1)

    def moves(route) -> list[int]:
        modifiers = make_modifiers(2, top_k=1, balance_bias=0.1)
        modifiers.before_call()
        route(modifiers)
        modifiers.before_call()
        return modifiers.balance_moves.tolist()

    assert moves(lambda m: route_rows(router, logits, modifiers=m)) == [-1, 1]
    one_real = torch.tensor([False, False, True])
    assert moves(lambda m: route_rows(router, logits, modifiers=m, real=one_real)) == [1, -1]
    assert moves(lambda m: route_rows(router, logits, modifiers=m.eval())) == [0, 0]
    with torch.no_grad():
        assert moves(lambda m: route_rows(router, logits, modifiers=m)) == [0, 0]


def test_balance_bias_can_wait_for_a_whole_update():
    """Three micro-batches of which the first two outweigh the third."""
    favours = [doubles([1, 0], [1, 0], [1, 0]), doubles([1, 0]), doubles([0, 1])]
    router = make_router("topk", 2, top_k=1)
    modifiers = make_modifiers(2, top_k=1, balance_bias={"rate": 0.1, "every": 3})
    seen = []
    for logits in favours * 2:
        modifiers.before_call()
        seen.append(modifiers.balance_moves.tolist())
        route_rows(router, logits, modifiers=modifiers)
    assert seen == [[0, 0]] * 3 + [[-1, 1]] * 3


@pytest.mark.parametrize(
    "name", [name for name, router in ROUTERS.items() if not router.by_preference]
)
def test_balance_bias_is_refused_where_it_would_do_nothing(name):
    with pytest.raises(ConfigError, match="balance_bias"):
        route_rows(
            make_router(name, 3),
            torch.randn(2, 3, dtype=torch.float64),
            modifiers=make_modifiers(3, balance_bias=0.1),
        )


# balance_bias in a model


def balanced_model():
    model = tiny_llama(layers=1)
    config = MoeLoraConfig(
        r=2,
        num_experts=4,
        top_k=2,
        lora_dropout=0.0,
        target_modules=["q_proj", "v_proj"],
        router_modifiers={"balance_bias": 0.01},
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(1)
    peft = get_peft_model(model, config).train()
    for layer in routed_layers(peft).values():
        for _, b in layer.expert_weights():
            b.normal_()
    return peft


def moves_of(model) -> dict[str, list[int]]:
    return {
        name: layer.moelora_modifiers["default"].balance_moves.tolist()
        for name, layer in routed_layers(model).items()
    }


def train(model, steps: int = 4) -> list[float]:
    torch.manual_seed(2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, 512, (2, 12))
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_balance_bias_is_the_same_under_activation_checkpointing(reentrant):
    plain = balanced_model()
    losses = train(plain)
    checkpointed = balanced_model()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        checkpointed.enable_input_require_grads()
    # The same operations in the same order.
    assert train(checkpointed) == losses
    assert moves_of(checkpointed) == moves_of(plain)
    assert any(any(moves) for moves in moves_of(plain).values())


def test_balance_bias_is_saved_and_loaded_to_the_bit(tmp_path):
    model = balanced_model()
    train(model)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            tiny_llama(layers=1), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert moves_of(loaded) == moves_of(model)
        ids = torch.arange(10).unsqueeze(0)
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_balance_bias_loses_nothing_in_half_precision():
    model = balanced_model()
    layers = routed_layers(model)
    for layer in layers.values():
        layer.moelora_modifiers["default"].balance_moves.fill_(10001)
    assert all(m == [10001] * 4 for m in moves_of(model.to(torch.bfloat16)).values())


def test_a_copy_counts_for_itself():
    modifiers, router = make_modifiers(4, balance_bias=0.1), make_router("topk", 4)
    modifiers.before_call()
    twin = copy.deepcopy(modifiers)
    route_rows(router, doubles([3, 2, 1, 0]), modifiers=modifiers)
    for one in (modifiers, twin):
        one.before_call()
    assert modifiers.balance_moves.tolist() == [-1, -1, 1, 1]
    assert twin.balance_moves.tolist() == [0, 0, 0, 0]


# Values


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", -1.0),
        ("temperature", "warm"),
        ("temperature", True),
        ("temperature", math.nan),
        ("jitter", 1.0),
        ("jitter", -0.1),
        ("noise", -1),
        ("noise", math.inf),
        ("expert_dropout", 1.0),
        ("capacity", 0),
        ("capacity", 1.5),
        ("capacity", None),
        ("capacity", {}),
        ("capacity", {"factor": 0}),
        ("capacity", {"factor": 1, "tokens": 1}),
        ("capacity", {"fraction": 1}),
        ("balance_bias", 0),
        ("balance_bias", {"rate": 0.1, "every": 0}),
        ("balance_bias", {"speed": 1}),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"router_modifiers\['{name}'\]"):
        make_modifiers(4, **{name: value})
