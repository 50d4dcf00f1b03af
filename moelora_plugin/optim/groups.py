"""Parameter groups: expert pairs, gates, and whatever else trains.

A group is an ordinary dict of torch's with a `role`:

    experts   params A0, B0, A1, B1, ...; `ranks`, `scalings`, `shared` and `frozen` hold one entry
              per pair. A factor that the expert kind freezes ("a" or "b" in `frozen`) is not among
              them, since an engine would give it a gradient and moments. Whoever takes its
              partner's metric reads it from `frozen_factors`, which `take_frozen` moves out of the
              group, since a state dict is no place for it; nor for `names`, which all groups
              have for messages, and `take_names` moves out
    gates     the routers' parameters; `max_grad_norm` clips their joint gradient
    other     expert tensors without a metric, biases, modules_to_save and the like; stepped
              without preconditioning

The pairs live in the group itself, by position, so that engines which replace parameters
(accelerate, FSDP) keep them paired, and everything in it is plain Python, so that
`torch.load(weights_only=True)` reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ..errors import ConfigError
from ..layers import MoeLoraLinear
from ..model import moelora_layers, routed_layers
from ..types import ExpertPair

EXPERTS = "experts"
GATES = "gates"
OTHER = "other"

Group = dict[str, Any]
# A parameter's place in the model and its name there, for messages.
Name = tuple[int, str]


@dataclass(frozen=True)
class FrozenFactor:
    """A tensor by its place, since engines that shard or move a model replace its tensors.

    Attributes:
        module: what holds it.
        name: its name there.
    """

    module: nn.Module
    name: str

    def __call__(self) -> Tensor:
        """The tensor as it is now."""
        return cast(Tensor, getattr(self.module, self.name))


def factors_of(group: Group) -> Iterator[tuple[nn.Parameter | None, nn.Parameter | None]]:
    """The pairs (A, B) of an experts group, None for a frozen factor."""
    parameters = iter(group["params"])
    for frozen in group["frozen"]:
        a = None if frozen == "a" else next(parameters)
        yield a, None if frozen == "b" else next(parameters)


def take_frozen(group: Group) -> list[FrozenFactor | None]:
    """Move the frozen factor of each pair out of the group; a group may say nothing of any."""
    none = ["none"] * len(group["ranks"])
    missing: list[FrozenFactor | None] = [None] * len(none)
    taken: list[FrozenFactor | None] = group.pop("frozen_factors", missing)
    for frozen, factor in zip(group.setdefault("frozen", none), taken, strict=True):
        if (frozen == "none") != (factor is None):
            raise ConfigError(
                "An experts group lacks its frozen factors; pass fresh groups of "
                "optim.groups.parameter_groups, which one optimizer can take."
            )
    return taken


def take_names(group: Group) -> list[Name]:
    """Move the parameters' names out of a group, which may say nothing of them."""
    unnamed = [(i, f"parameter {i}") for i in range(len(group["params"]))]
    names: list[Name] = group.pop("names", unnamed)
    return names


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
    placed = [(module, pair) for module, pairs in pairs_by_module(model) for pair in pairs]
    pairs = [pair for _, pair in placed]
    gates = [p for layer in routed_layers(model).values() for p in layer.gate_parameters()]
    experts = [p for pair in pairs for p in _trained(pair)]
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
            "frozen": [pair.frozen for pair in pairs],
            "frozen_factors": [frozen_factor(module, pair) for module, pair in placed],
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
    names = {id(p): (i, name) for i, (name, p) in enumerate(model.named_parameters())}
    for group in groups:
        group["names"] = [names[id(p)] for p in group["params"]]
    return [group for group in groups if group["params"]]


def _trained(pair: ExpertPair) -> list[Tensor]:
    """The factors of a pair that train."""
    return [f for side, f in (("a", pair.a), ("b", pair.b)) if side != pair.frozen]


def frozen_factor(module: nn.Module, pair: ExpertPair) -> FrozenFactor | None:
    """Where the frozen factor of one of the module's pairs is; None where both train."""
    if pair.frozen == "none":
        return None
    factor = pair.a if pair.frozen == "a" else pair.b
    return next(
        FrozenFactor(inner, name)
        for inner in module.modules()
        for name, parameter in inner.named_parameters(recurse=False)
        if parameter is factor
    )


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
