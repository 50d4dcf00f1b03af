"""What a step does to the full weight X = W + s sum_i g_i B_i A_i (arXiv 2502.15828, eq. 9 to 13).

With ordinary gradients G = dL/dX, a preconditioned SGD step with gate exponent p moves X, to first
order, by

    -lr s^2 sum_i g_i^(1+p) (P_col(B_i) G + G P_row(A_i))

The gates are fixed here: a router of a user's own, named by dotted path, gives every token the
same.

Shape suffixes: I in, O out, E experts.
"""

from __future__ import annotations

import pytest
import torch
from fixed_gates import Three
from peft import get_peft_model
from torch import nn

from moelora_plugin import MoeLoraConfig, build_optimizer
from moelora_plugin.types import LayerPlan, Place

GATES = Three.gates
D_IN, D_OUT, RANK, ALPHA = 9, 7, 2, 5.0
SCALING = ALPHA / RANK


def unequal_ranks(config: MoeLoraConfig, place: Place) -> LayerPlan:
    return LayerPlan(num_experts=3, top_k=3, ranks=(1, 2, 3), alpha=ALPHA)


def build(mode: str, allocation: str = "uniform"):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False)).double()
    config = MoeLoraConfig(
        r=RANK,
        num_experts=3,
        top_k=3,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=["0"],
        router="fixed_gates.Three",
        allocation=allocation,
        gate_rescale=mode,
    )
    model = get_peft_model(net, config)
    for _, b in net[0].expert_weights():
        b.normal_()
    return model, net[0]


def full_weight(layer) -> torch.Tensor:
    update = layer.static_update(weights_E=torch.tensor(GATES, dtype=torch.float64))
    return layer.base_layer.weight.detach() + update


def projection(basis: torch.Tensor) -> torch.Tensor:
    """Onto the column space of `basis`, by its QR decomposition."""
    q, _ = torch.linalg.qr(basis)
    return q @ q.T


def movement(model, layer, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """(X after - X before) / lr for one step, and the gradient of the loss in X."""
    lr = 1e-8
    x = torch.randn(20, D_IN, dtype=torch.float64)
    upstream = torch.randn(20, D_OUT, dtype=torch.float64)
    optimizer = build_optimizer(model, "rsgd", lr=lr, damping=1e-14, **options)
    before = full_weight(layer)
    (model(x) * upstream).sum().backward()
    optimizer.step()
    return (full_weight(layer) - before) / lr, upstream.T @ x


# The second-order term is lr times products of order 1e2; X is of order ten and known to 1e-15,
# which over lr is 1e-7 as well.
FIRST_ORDER = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.filterwarnings("ignore:rsgd stands for gate_rescale:UserWarning")
@pytest.mark.parametrize(
    "allocation", ["uniform", f"{__name__}.unequal_ranks"], ids=["equal", "unequal"]
)
@pytest.mark.parametrize(("mode", "exponent"), [("none", 2.0), ("sqrt", 1.5), ("exact", 1.0)])
def test_a_step_moves_x_by_the_gate_weighted_projections(mode, exponent, allocation):
    model, layer = build(mode, allocation)
    factors = [(a.clone(), b.clone()) for a, b in layer.expert_weights()]
    moved, gradient = movement(model, layer)
    expected = torch.zeros_like(gradient)
    for gate, (a, b) in zip(GATES, factors, strict=True):
        expected -= gate**exponent * (projection(b) @ gradient + gradient @ projection(a.T))
    scaling = ALPHA / 2  # the mean rank is 2 in both allocations
    torch.testing.assert_close(moved, scaling**2 * expected, **FIRST_ORDER)


def test_scale_compensation_divides_the_squared_scale_out():
    model, layer = build("none")
    moved, _ = movement(model, layer)
    torch.manual_seed(0)
    model, layer = build("none")
    compensated, _ = movement(model, layer, scale_compensation=True)
    torch.testing.assert_close(compensated, moved / SCALING**2, **FIRST_ORDER)


def test_orthonormal_factors_make_the_preconditioner_a_number():
    model, layer = build("none")
    for a, b in layer.expert_weights():
        a.copy_(torch.linalg.qr(a.T)[0].T)
        b.copy_(torch.linalg.qr(b)[0])
    a, b = layer.moelora_A["default"].weight, layer.moelora_B["default"].weight
    before_a, before_b = a.detach().clone(), b.detach().clone()
    optimizer = build_optimizer(model, "rsgd", lr=1.0, damping=0.25)
    model(torch.randn(20, D_IN, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    # (I + 0.25 I)^-1 = 0.8 I, to some roundings of the inverse.
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(a.detach(), before_a - 0.8 * a.grad, **close)
    torch.testing.assert_close(b.detach(), before_b - 0.8 * b.grad, **close)
