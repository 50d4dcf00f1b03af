"""Time of an optimizer's step, and of a training step with preconditioning in the backward.

    python benchmarks/optimizer.py

A chain of 24 linears of 1024 x 1024 with 20 experts of rank 4 each. The step of RAdamW stands
beside torch's fused AdamW on the same tensors, which is the limit, the way published code steps
(one expert after the other, metrics, inverses and AdamW spelled out) and PEFT's Riemannian
optimizer on LoRA of the same total rank. Then forward, backward and step: AdamW on the gradients as
they are, AdamW behind the hooks of `in_backward`, and RAdamW.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft.optimizers import create_riemannian_optimizer
from report import main
from subjects import EXPERTS, RANK, adapted, lora, mixture
from timing import Result, Settings, interleave
from torch import Tensor, nn

from moelora_plugin.optim import build_optimizer

MODULES, WIDTH, TOKENS = 24, 1024, 512
_TARGETS = r".*linears\.\d+"
LR = 1e-6  # so small that hundreds of steps leave the weights where they are

OURS, ADAMW, LOOP = "RAdamW", "AdamW, fused", "per-expert Python"
PEFT = f"PEFT's Riemannian AdamW, LoRA r {EXPERTS * RANK}"
HOOKS = "AdamW, in_backward"


class Chain(nn.Module):
    """Frozen linears, one after the other."""

    def __init__(self, modules: int, width: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(modules))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Through all of them."""
        for linear in self.linears:
            x = torch.tanh(linear(x))
        return x


class PerExpert:
    """RAdamW as published code has it: every expert's factors are tensors of their own.

    Suffixes: I in, O out, r rank of one expert.
    """

    def __init__(self, modules: int, width: int, device: str) -> None:
        shapes = [(RANK, width), (width, RANK)] * (modules * EXPERTS)
        self.experts = [torch.randn(shape, device=device) * 0.02 for shape in shapes]
        self.gates = [torch.randn(EXPERTS, width, device=device) * 0.02 for _ in range(modules)]
        tensors = self.experts + self.gates
        self.grads = [torch.randn_like(tensor) for tensor in tensors]
        self.means = [torch.zeros_like(tensor) for tensor in tensors]
        self.squares = [torch.zeros_like(tensor) for tensor in tensors]
        self.steps = 0

    def step(self) -> None:
        """Precondition pair by pair, then AdamW tensor by tensor."""
        self.steps += 1
        grads = list(self.grads)
        eye = torch.eye(RANK, device=grads[0].device)
        for i in range(0, len(self.experts), 2):
            a_rI, b_Or = self.experts[i : i + 2]
            for_a = torch.linalg.inv(b_Or.T @ b_Or + 1e-6 * eye)
            for_b = torch.linalg.inv(a_rI @ a_rI.T + 1e-6 * eye)
            grads[i], grads[i + 1] = for_a @ grads[i], grads[i + 1] @ for_b
        for tensor, grad, mean, square in zip(
            self.experts + self.gates, grads, self.means, self.squares, strict=True
        ):
            mean.mul_(0.9).add_(grad, alpha=0.1)
            square.mul_(0.999).addcmul_(grad, grad, value=0.001)
            length = LR * (1 - 0.999**self.steps) ** 0.5 / (1 - 0.9**self.steps)
            tensor.addcdiv_(mean, square.sqrt().add_(1e-6), value=-length)


def measure(settings: Settings, modules: int = MODULES, width: int = WIDTH) -> Result:
    """The step alone, then the whole training step."""
    result = Result()
    what = f"step, {modules} x {width} x {width}, {EXPERTS} experts of rank {RANK}"
    times = interleave(
        _steps(settings, modules, width), settings, seldom=(LOOP, PEFT), label="optimizer step"
    )
    result.add(what, times)
    result.comparisons += [
        times.compare(what, OURS, ADAMW, at_most=2.0),
        times.compare(what, OURS, LOOP, theirs_over_ours=True, at_least=20.0),
        times.compare(what, OURS, PEFT, theirs_over_ours=True),
    ]
    what = f"training step, the same, {TOKENS} tokens"
    times = interleave(_training(settings, modules, width), settings, label="training step")
    result.add(what, times)
    result.comparisons += [
        times.compare(what, HOOKS, ADAMW),
        times.compare(what, OURS, ADAMW),
        times.compare(what, HOOKS, OURS),
    ]
    return result


def _model(config: object, settings: Settings, modules: int, width: int) -> nn.Module:
    base = Chain(modules, width).to(settings.device, settings.dtype)
    return adapted(base, config, settings)


def _fused_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LR, fused=True)


def _steps(settings: Settings, modules: int, width: int) -> dict[str, Callable[[], object]]:
    """Steps on gradients that stay."""
    models = [
        _model(config, settings, modules, width)
        for config in (mixture(_TARGETS), mixture(_TARGETS), lora(_TARGETS))
    ]
    for model in models:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
    ours, plain, single = models
    return {
        OURS: build_optimizer(ours, "radamw", lr=LR).step,
        ADAMW: _fused_adamw(plain).step,
        LOOP: PerExpert(modules, width, settings.device).step,
        PEFT: create_riemannian_optimizer(single, torch.optim.AdamW, lr=LR, fused=True).step,
    }


def _training(settings: Settings, modules: int, width: int) -> dict[str, Callable[[], None]]:
    """Forward, backward and step."""
    ours, hooked, plain = (_model(mixture(_TARGETS), settings, modules, width) for _ in range(3))
    optimizers = {
        OURS: (ours, build_optimizer(ours, "radamw", lr=LR)),
        HOOKS: (
            hooked,
            build_optimizer(
                hooked, "radamw", lr=LR, gate_max_grad_norm=None, in_backward=True, fused=True
            ),
        ),
        ADAMW: (plain, _fused_adamw(plain)),
    }
    x = torch.randn(TOKENS, width, device=settings.device, dtype=settings.dtype)
    return {name: _training_step(*pair, x, settings) for name, pair in optimizers.items()}


def _training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, settings: Settings
) -> Callable[[], None]:
    def call() -> None:
        with settings.autocast():
            y = model(x)
        y.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


if __name__ == "__main__":
    main(measure, __file__, __doc__)
