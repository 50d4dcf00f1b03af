"""Parameter groups: expert pairs, gates, and whatever else trains.

A group is an ordinary dict of torch's with a `role`:

    experts   params A0, B0, A1, B1, ...; `ranks`, `scalings` and `shared` hold one entry per pair.
              A factor that the expert kind freezes is there too, for its partner's metric; it has
              no gradient, so nothing moves it
    gates     the routers' parameters; `max_grad_norm` clips their joint gradient
    other     expert tensors without a metric, biases, modules_to_save and the like; stepped
              without preconditioning

The pairs live in the group itself, by position, so that engines which replace parameters
(accelerate, FSDP) keep them paired, and everything in it is plain Python, so that
`torch.load(weights_only=True)` reads it.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ..errors import ConfigError
from ..layers import MoeLoraLinear
from ..model import moelora_layers, routed_layers
from ..types import ExpertPair

EXPERTS = "experts"
GATES = "gates"
OTHER = "other"

Group = dict[str, Any]


def pairs_of(module: nn.Module) -> list[ExpertPair]:
    """Trainable (A, B) pairs of one adapted module; PEFT's own LoRA linears hold single experts.

    LoRA on embeddings and convolutions has no such pair and trains as an ordinary parameter.
    """
    if isinstance(module, MoeLoraLinear):
        return module.expert_pairs()
    if not isinstance(module, LoraLayer):
        return []
    pairs = []
    for adapter in module.lora_A:
        if adapter not in module.lora_B:
            continue
        a: Any = module.lora_A[adapter].weight
        b: Any = module.lora_B[adapter].weight
        if a.ndim == b.ndim == 2 and a.requires_grad and b.requires_grad:
            pairs.append(ExpertPair(a, b, (a.shape[0],), module.scaling[adapter]))
    return pairs


def pairs_by_module(model: nn.Module) -> list[tuple[nn.Module, list[ExpertPair]]]:
    """Every adapted module of `model` with its trainable pairs; none where only routers train.

    Raises:
        ConfigError: there is no adapter that trains.
    """
    found = [(module, pairs) for module in model.modules() if (pairs := pairs_of(module))]
    layers = routed_layers(model).values()
    if not found and not any(layer.trainable_parameters() for layer in layers):
        raise ConfigError(
            "The model has no trainable LoRA experts; add an adapter first, for example with "
            "peft.get_peft_model(model, MoeLoraConfig(...))."
        )
    return found


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    gate_lr: float,
    gate_max_grad_norm: float | None,
    weight_decay: float,
) -> list[Group]:
    """Sort every trainable parameter of `model` into groups; empty groups are left out.

    Raises:
        ConfigError: the model has no trainable experts, or a parameter of a MoE-LoRA layer is in no
            group.
    """
    pairs = [pair for _, pairs in pairs_by_module(model) for pair in pairs]
    gates = [p for layer in routed_layers(model).values() for p in layer.gate_parameters()]
    experts = [p for pair in pairs for p in (pair.a, pair.b)]
    unpaired = [p for layer in moelora_layers(model).values() for p in layer.unpaired_parameters()]
    _refuse_uncovered(model, {id(p) for p in (*experts, *gates, *unpaired)})
    covered = {id(p) for p in (*experts, *gates)}
    other = [p for p in model.parameters() if p.requires_grad and id(p) not in covered]
    groups: list[Group] = [
        {
            "params": experts,
            "role": EXPERTS,
            "lr": lr,
            "weight_decay": weight_decay,
            "ranks": [list(pair.ranks) for pair in pairs],
            "scalings": [pair.scaling for pair in pairs],
            "shared": [pair.shared for pair in pairs],
        },
        {
            "params": gates,
            "role": GATES,
            "lr": gate_lr,
            "weight_decay": 0.0,
            "max_grad_norm": gate_max_grad_norm,
        },
        # As everywhere: biases and norms (one dimension) are not decayed.
        {
            "params": [p for p in other if p.ndim > 1],
            "role": OTHER,
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {"params": [p for p in other if p.ndim <= 1], "role": OTHER, "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _refuse_uncovered(model: nn.Module, covered: set[int]) -> None:
    """A trainable expert factor whose partner is frozen has no metric: say so, do not skip it."""
    for layer_name, layer in routed_layers(model).items():
        for name, parameter in layer.named_parameters():
            if (
                name.startswith("moelora_")
                and parameter.requires_grad
                and id(parameter) not in covered
            ):
                raise ConfigError(
                    f"{layer_name}.{name} trains but its partner does not, so it has no Riemannian "
                    "metric; set requires_grad alike on A and B of an adapter."
                )
