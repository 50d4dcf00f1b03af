"""What an adapter will take on a base, before either has weights: `moelora plan`."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.config import PeftConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..base_model import default_device, load_config, resolve_dtype
from ..call import ROUTING_IDS
from ..config import MoeLoraConfig
from ..errors import ConfigError, ReachWarning, first_line
from ..layers import MoeLoraLinear
from ..model import MoeLoraModel, find_tuner, moelora_layers, routed_layers
from ..targets import choose_targets
from .cost import StepCost, preconditioning_operations, step_cost
from .plan_table import plan_table

_ADAPTER = "default"
# Tensors of a parameter's size and dtype that torch's own optimizers keep.
_MOMENTS = {"rsgd": 0, "grsgd": 0, "radamw": 2, "gradamw": 2}


@dataclass(frozen=True)
class Step:
    """The training step that is planned.

    Attributes:
        optimizer: a name of `build_optimizer`.
        batch: sequences in a micro-batch.
        length: tokens in each.
        autocast: dtype of mixed precision, or None.
        checkpointing: whether activations are computed again in the backward.
    """

    optimizer: str = "gradamw"
    batch: int = 8
    length: int = 256
    autocast: str | None = None
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        """In a micro-batch."""
        return self.batch * self.length


@dataclass(frozen=True)
class AdaptedModules:
    """Target modules of one name, one size and one allocation.

    Attributes:
        name: the last part of their names.
        count: how many there are.
        in_features: I.
        out_features: O.
        ranks: the rank of each expert.
        top_k: experts selected for a token.
        path: "dense", or "grouped" where a step here computes the selected experts alone.
    """

    name: str
    count: int
    in_features: int
    out_features: int
    ranks: tuple[int, ...]
    top_k: int
    path: str


@dataclass(frozen=True)
class Use:
    """What a model takes.

    Attributes:
        trainable: parameters that train.
        weight_bytes: of the base and what was added to it.
        added_bytes: of what was added, trained or not.
        gradient_bytes: of all gradients.
        optimizer_bytes: of the optimizer's state.
        file_bytes: of the adapter's safetensors file, without its header.
        step: of a training step; None where it depends on the data.
    """

    trainable: int
    weight_bytes: int
    added_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    file_bytes: int
    step: StepCost | None

    @property
    def peak_bytes(self) -> int | None:
        """Weights, optimizer state and the most that a step holds besides."""
        if self.step is None:
            return None
        return self.weight_bytes + self.optimizer_bytes + self.step.peak_bytes


@dataclass(frozen=True)
class AdapterPlan:
    """An adapter on a base, beside the base alone and PEFT's LoRA of the same total rank.

    Attributes:
        base: its name.
        dtype: of the base's weights.
        base_parameters: how many it has.
        config: the adapter's configuration.
        at: the training step.
        modules: what is adapted.
        expert_parameters: parameters of experts that train.
        router_parameters: parameters of routers that train.
        frozen_entries: entries of the adapter's tensors that do not train.
        preconditioning: operations per optimizer step, by eq. 6 of the paper.
        alone: the base, frozen, its input differentiated.
        lora: the base with LoRA.
        ours: the base with the adapter.
        notes: what of the base the adapter does not reach.
    """

    base: str
    dtype: str
    base_parameters: int
    config: MoeLoraConfig
    at: Step
    modules: tuple[AdaptedModules, ...]
    expert_parameters: int
    router_parameters: int
    frozen_entries: int
    preconditioning: int
    alone: Use
    lora: Use
    ours: Use
    notes: tuple[str, ...] = ()

    @property
    def added_activation_bytes(self) -> int | None:
        """What the adapter makes a step keep for its backward, on top of the base's."""
        if self.ours.step is None or self.alone.step is None:
            return None
        return self.ours.step.saved_bytes - self.alone.step.saved_bytes

    def to_dict(self) -> dict[str, Any]:
        """As plain values; counts of parameters, operations and bytes are exact integers."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["config"]
        for key in ("at", "alone", "lora", "ours"):
            values[key] = dataclasses.asdict(values[key])
        for key in ("alone", "lora", "ours"):
            values[key]["peak_bytes"] = getattr(self, key).peak_bytes
        values["modules"] = [dataclasses.asdict(module) for module in self.modules]
        values["added_activation_bytes"] = self.added_activation_bytes
        return values

    def table(self) -> Any:
        """For the terminal."""
        return plan_table(self)


def plan_adapter(
    base: str,
    config: MoeLoraConfig,
    at: Step | None = None,
    *,
    revision: str | None = None,
    dtype: str = "auto",
) -> AdapterPlan:
    """Count what an adapter takes, on a model that has shapes only.

    Args:
        base: a folder or hub id, of which only the configuration is read.
        config: the adapter's.
        at: the training step.
        revision: branch, tag or commit on the hub.
        dtype: of the base's weights; "auto" as `load_base_model` has it on this machine.

    Raises:
        ConfigError: the base is no causal language model, or does not take the adapter.
        MissingDependencyError: no such folder, and the hub cannot be reached or does not know it.
    """
    at = at or Step()
    shape = load_config(base, revision, option="--model")
    resolved = resolve_dtype(dtype, default_device())
    if resolved == "auto":
        resolved = shape.dtype or torch.float32
    assert isinstance(resolved, torch.dtype)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ReachWarning)
        plan = _count(base, shape, config, at, resolved)
    notes = []
    for warning in caught:
        if issubclass(warning.category, ReachWarning):
            notes.append(str(warning.message))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return dataclasses.replace(plan, notes=tuple(dict.fromkeys(notes)))


def _count(
    base: str, shape: PretrainedConfig, config: MoeLoraConfig, at: Step, resolved: torch.dtype
) -> AdapterPlan:
    adapted = adapt_empty(shape, config, resolved)
    layers = moelora_layers(adapted)
    plans = {name: layer.moelora_mixture[_ADAPTER].plan for name, layer in layers.items()}
    routers = {id(p) for m in routed_layers(adapted).values() for p in m.gate_parameters()}
    experts = [
        p
        for layer in layers.values()
        for p in layer.tensors(_ADAPTER).values()
        if isinstance(p, nn.Parameter) and p.requires_grad
    ]
    pairs = [pair for layer in layers.values() for pair in layer.expert_pairs()]
    alone = empty_base(shape, resolved)
    alone.requires_grad_(False)
    ranks = {_inner(name): plan.total_rank for name, plan in plans.items()}
    lora = adapt_empty(shape, _lora(ranks, config.lora_dropout), resolved)
    base_bytes = _bytes(alone.parameters())
    return AdapterPlan(
        base=base,
        dtype=str(resolved).removeprefix("torch."),
        base_parameters=_numel(alone.parameters()),
        config=config,
        at=at,
        modules=_modules(layers, at.tokens),
        expert_parameters=_numel(experts),
        router_parameters=sum(p.numel() for p in adapted.parameters() if id(p) in routers),
        frozen_entries=_numel(_own_frozen(adapted)),
        preconditioning=preconditioning_operations(pairs),
        # Last: counting a step makes a model useless for anything else.
        alone=_use(alone, base_bytes, at),
        lora=_use(lora, base_bytes, at),
        ours=_use(adapted, base_bytes, at),
    )


def empty_base(shape: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    """A causal language model without weights.

    Raises:
        ConfigError: the configuration is of something else.
    """
    try:
        with init_empty_weights():
            model: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(shape), dtype=dtype)
    except ValueError as error:
        if type(shape) not in AutoModelForCausalLM._model_mapping:
            raise ConfigError(
                f"A base of type {shape.model_type!r} is no causal language model; pass another "
                "one with --model."
            ) from error
        raise _unbuilt(shape, error) from error
    except Exception as error:  # its own code runs here
        raise _unbuilt(shape, error) from error
    model.tie_weights()  # type: ignore[operator]  # empty weights are made one by one
    return model


def _unbuilt(shape: PretrainedConfig, error: Exception) -> ConfigError:
    return ConfigError(
        f"A base of type {shape.model_type!r} cannot be built from its configuration "
        f"({type(error).__name__}: {first_line(error)}); mend its config.json, or pass another one "
        "with --model."
    )


def adapt_empty(shape: PretrainedConfig, config: PeftConfig, dtype: torch.dtype) -> PeftModel:
    """A base without weights with an adapter without values, that trains.

    Args:
        shape: the base's configuration.
        config: the adapter's; it is copied.
        dtype: of the base's weights.
    """
    config = copy.deepcopy(config)
    base = empty_base(shape, dtype)
    if isinstance(config, MoeLoraConfig):
        # Before the next line, since the names of a file are not judged.
        choose_targets(
            base, config, MoeLoraModel.target_module_mapping, shape.model_type, is_saved=False
        )
        config.from_file = True  # so no initialisation asks for adapters or the base's weights
    else:
        # By this PEFT knows which names to take for fused experts'; LoRA is put on linears here.
        cast(Any, base).config.model_type = "linears"
    return cast(PeftModel, get_peft_model(base, config, low_cpu_mem_usage=True))


def _lora(ranks: dict[str, int], dropout: float) -> LoraConfig:
    """PEFT's LoRA with the total rank of each module."""
    usual = max(ranks.values())
    return LoraConfig(
        r=usual,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != usual},
        lora_dropout=dropout,
        target_modules=list(ranks),
    )


def _use(model: nn.Module, base_bytes: int, at: Step) -> Use:
    trainable = [p for p in model.parameters() if p.requires_grad]
    weights = _bytes(model.parameters())
    file = 0
    if isinstance(model, PeftModel):
        file = _bytes(get_peft_model_state_dict(model, save_embedding_layers=False).values())
    return Use(
        trainable=_numel(trainable),
        weight_bytes=weights,
        added_bytes=weights - base_bytes,
        gradient_bytes=_bytes(trainable),
        optimizer_bytes=_MOMENTS[at.optimizer] * _bytes(trainable),
        file_bytes=file,
        step=step_cost(
            model,
            at.batch,
            at.length,
            autocast=getattr(torch, at.autocast) if at.autocast else None,
            checkpointing=at.checkpointing,
            arguments=ROUTING_IDS if find_tuner(model) else (),
        ),
    )


def _own_frozen(model: nn.Module) -> list[Tensor]:
    """What of the adapter never trains."""
    return [p for name, p in model.named_parameters() if "moelora_" in name and not p.requires_grad]


def _modules(layers: dict[str, MoeLoraLinear], tokens: int) -> tuple[AdaptedModules, ...]:
    """One entry for all that are alike, in the model's order."""
    counted: dict[AdaptedModules, int] = {}
    device = torch.device(default_device()).type
    for name, layer in layers.items():
        plan = layer.moelora_mixture[_ADAPTER].plan
        kind = AdaptedModules(
            name.rpartition(".")[2],
            0,
            layer.in_features,
            layer.out_features,
            plan.ranks,
            plan.top_k,
            "grouped" if layer.by_groups(tokens, device, _ADAPTER) else "dense",
        )
        counted[kind] = counted.get(kind, 0) + 1
    return tuple(dataclasses.replace(kind, count=count) for kind, count in counted.items())


def _inner(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _numel(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
