"""MoeLoraModel: the PEFT tuner that puts MoeLoraLinear in place of the target modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import peft
from accelerate import init_empty_weights
from packaging.version import Version
from peft.config import PeftConfig
from peft.peft_model import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from .allocation import ALLOCATIONS
from .config import MoeLoraConfig
from .errors import ConfigError
from .frozen import freeze_again
from .initialization import INITIALIZATIONS
from .layers import AuxLosses, MoeLoraLinear, RoutedLayer, Shared, refuse_tied
from .layers.awaited import AwaitedValues, refuse_awaited, unwatch_awaited
from .layers.block import blocks_by_adapter, blocks_of
from .layers.first_step import FirstStep, unwatch_first_steps
from .layers.mixed import mixed_batch
from .layers.sites import SITES, Site
from .layers.streams import assign_streams
from .lookup import lookup, with_options
from .ops.finite import refuse_damaged
from .stored import MARK, refuse_foreign, tensors_of_base
from .targets import choose_targets
from .types import GateRescale, Place

# What the sequences of a call or of a generation may be called.
_INPUTS = ("input_ids", "inputs", "inputs_embeds", "input_features", "pixel_values")


class MoeLoraModel(BaseTuner):
    """A model whose target modules carry mixtures of LoRA experts.

    Made by `peft.get_peft_model(model, MoeLoraConfig(...))`; saving, loading, several named
    adapters, `disable_adapter` and `modules_to_save` are PEFT's own.
    """

    prefix: str = "moelora_"
    tuner_layer_cls = RoutedLayer
    target_module_mapping = cast(
        "dict[str, list[str]]", TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    )

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        _refuse_nesting(model)
        # The constructor injects the first adapter, whose layers share this. Where adapters are
        # added without a PeftModel, each comes with a tuner of its own.
        self.shared = next((layer.shared for layer in routed_layers(model).values()), Shared())
        self._sites: dict[str, Site] = {}
        # The modules of an adapter that is injected by the keys of a state dict.
        self._from_state_dict: set[str] | None = None
        # Whether the next tensors to be loaded are those of an adapter's file.
        self._awaits_file = False
        super().__init__(model, *args, **kwargs)

    @property
    def aux_losses(self) -> AuxLosses:
        """How much auxiliary losses weigh."""
        return self.shared.aux_losses

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted model's; called, where PEFT before 0.21 bypasses the model's hooks."""
        return self.model(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's hook around each call and generation: `adapter_names` are its arguments' here."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        found = [kwargs[key] for key in _INPUTS if kwargs.get(key) is not None]
        given = next((len(value) for value in (*args[:1], *found)), None)
        with mixed_batch(self.model, self.shared, names, given), blocks_by_adapter(self.model):
            yield

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """PEFT's own, once the targets are settled; then what the layers share is set up."""
        config = self.config_of(adapter_name)
        is_saved = config.from_file or config.inference_mode
        if not is_saved:
            _refuse_pattern_alone(config)
        state_dict = kwargs.get("state_dict")
        self._from_state_dict = None
        if state_dict is not None:
            keys = (key.rsplit(f".{self.prefix}", 1)[0] for key in state_dict)
            self._from_state_dict = {_own_name(key) for key in keys}
        choose_targets(
            model,
            config,
            self.target_module_mapping,
            self.get_model_config(model).get("model_type"),
            is_saved=is_saved or state_dict is not None,
        )
        tuned = [n for n, m in model.named_modules() if isinstance(m, RoutedLayer)]
        self._places = places(
            _own_name(name)
            for name, _ in model.named_modules()
            if name and not any(name.startswith(f"{inside}.") for inside in tuned)
        )
        self._sites.pop(adapter_name, None)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        empty = kwargs.get("low_cpu_mem_usage", False)
        with init_empty_weights() if empty else nullcontext():
            if adapter_name in self._sites:
                self._sites[adapter_name].connect(model, adapter_name, self.shared)
        self.aux_losses.num_layers[adapter_name] = sum(
            adapter_name in layer.moelora_router for layer in routed_layers(model).values()
        )
        assign_streams(model, self.shared.call)
        self._awaits_file = config.from_file
        unwatch_awaited(model, adapter_name)  # of one that was deleted
        if is_saved and lookup("initializations", config.init, INITIALIZATIONS).reads_data:
            AwaitedValues(adapter_name, config.init).watch(model)
        if not config.inference_mode:
            FirstStep(adapter_name).watch(model)

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        """Say what is wrong with the base before PEFT says less, or nothing."""
        assert isinstance(config, MoeLoraConfig)
        _refuse_sharded(model)
        if config.bias != "none" and not config.inference_mode and not _saves_biases():
            raise ConfigError(
                f"bias={config.bias!r} trains biases of the base, which PEFT {peft.__version__} "
                "does not save for an adapter like this; install PEFT 0.21, or set bias to 'none'."
            )

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, MoeLoraConfig)
        place = self._places[_own_name(current_key)]
        plan = with_options(
            "allocation_kwargs",
            lookup("allocations", peft_config.allocation, ALLOCATIONS),
            peft_config.allocation_kwargs,
            peft_config,
            place,
        )
        site = self._site_of(adapter_name, peft_config)
        plan, router_plan = site.expert_plan(place, plan), site.router_plan(place, plan)
        if isinstance(target, MoeLoraLinear):
            target.update_layer(adapter_name, peft_config, plan, router_plan, current_key)
            return
        layer = MoeLoraLinear(
            target, adapter_name, peft_config, plan, self.shared, router_plan, current_key
        )
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter does not train until it is made active
        self._replace_module(parent, target_name, layer, target)

    def _site_of(self, adapter: str, config: MoeLoraConfig) -> Site:
        """The site of the adapter that is being injected; made at its first target module."""
        if adapter not in self._sites:
            targets = [
                place
                for name, place in self._places.items()
                if (
                    self._check_target_module_exists(config, name)
                    if self._from_state_dict is None
                    else name in self._from_state_dict
                )
            ]
            if not (config.inference_mode or config.from_file):
                with_options(
                    "init_kwargs",
                    lookup("initializations", config.init, INITIALIZATIONS),
                    config.init_kwargs,
                ).check_targets([place.name for place in targets])
            self._sites[adapter] = with_options(
                "site_kwargs",
                lookup("sites", config.site, SITES),
                config.site_kwargs,
                config,
                targets,
            )
        return self._sites[adapter]

    def config_of(self, adapter: str) -> MoeLoraConfig:
        """The adapter's configuration."""
        return cast(MoeLoraConfig, self.peft_config[adapter])

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: mixtures are no weights that could be added.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "add_weighted_adapter adds up weights, and each mixture weighs its experts by gates of "
            "its own, so no adapter is the sum of several; have them act at once by "
            "base_model.set_adapter([...]), or answer each sequence by its own with adapter_names."
        )

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's own; then blocks without adapters leave their modules."""
        super().delete_adapter(adapter_name)
        for ffn, block in blocks_of(self.model):
            if not block.moelora_router:
                block.remove_from(ffn)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """PEFT's own, which would stop half-way at a layer that cannot be merged."""
        self._refuse_partial_merge(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        """PEFT's own, which leaves alone what replaces no module."""
        if merge:
            self._refuse_partial_merge(adapter_names)
        super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for ffn, block in blocks_of(self.model):
            block.remove_from(ffn)
        # Our hooks would take the ids of an adapter that is added next, or wait for it.
        self.shared.call.unwatch(self.model)
        unwatch_first_steps(self.model)
        unwatch_awaited(self.model)
        return self.model

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """PEFT's own, which on the way out copies the weight of what stands there to what comes.

        That is the same weight, but for PEFT's wrappers, which compute theirs, and for quantised
        linears, which have none of that name.
        """
        if isinstance(new_module, RoutedLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            setattr(parent, child_name, new_module)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Torch's own, after a look at what would go elsewhere than into our layers.

        The layers look at theirs (`RoutedLayer`). A state dict with all of the base's weights is a
        whole model's, whose masks may be infinite, and one without a tensor of ours is somebody's
        own for the base; but a file of an adapter is neither.

        Raises:
            AdapterError: see `refuse_damaged` and `refuse_foreign`.
        """
        biases = any(self.config_of(name).bias != "none" for name in self.peft_config)
        base = tensors_of_base(self, biases=biases)
        others = {key: value for key, value in state_dict.items() if MARK not in key}
        is_part = len(others) < len(state_dict) and any(f"{prefix}{n}" not in others for n in base)
        if self._awaits_file or is_part:
            refuse_damaged(others)
            refuse_foreign(self, state_dict, prefix, adapters=self.peft_config, biases=biases)
        self._awaits_file = False
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _refuse_partial_merge(self, adapter_names: list[str] | None) -> None:
        """Ask every layer before the first is touched.

        Raises:
            ExportError: a layer cannot be merged.
            ConfigError: an adapter has no values.
        """
        for adapter in adapter_names or self.active_adapters:
            refuse_awaited(self.model, adapter)
        merging = {}
        for name, layer in moelora_layers(self.model).items():
            for adapter in adapter_names or layer.active_adapters:
                if adapter in layer.moelora_mixture and adapter not in layer.merged_adapters:
                    layer.refuse_merge(adapter)
                    merging[name] = layer
        refuse_tied(self.model, merging)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """PEFT's own, where `bias="all"` means all that is called bias: ours stay frozen."""
        super()._mark_only_adapters_as_trainable(model)
        freeze_again(model)


def moelora_layers(model: nn.Module) -> dict[str, MoeLoraLinear]:
    """Every adapted module by its name in `model`."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, MoeLoraLinear)
    }


def routed_layers(model: nn.Module) -> dict[str, RoutedLayer]:
    """Every module with a router by its name in `model`."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, RoutedLayer)
    }


def places(names: Iterable[str]) -> dict[str, Place]:
    """Where each of a model's modules is: in which decoder layer, of how many.

    A layer list is what has numbered children; the first number in a name counts, so that a vision
    tower's layers and a language model's are counted apart.
    """
    found: dict[str, tuple[str, int] | None] = {}
    lengths: dict[str, int] = {}
    for name in names:
        match = re.search(r"(?:^|\.)(\d+)\.", name)
        found[name] = (name[: match.start()], int(match[1])) if match else None
        if match:
            stem = name[: match.start()]
            lengths[stem] = max(lengths.get(stem, 0), int(match[1]) + 1)
    return {
        name: Place(name) if at is None else Place(name, at[1], lengths[at[0]])
        for name, at in found.items()
    }


def active_configs(model: nn.Module) -> dict[str, MoeLoraConfig]:
    """The active adapters' configurations by name, whoever added the adapters: PEFT or the base."""
    active = [name for layer in routed_layers(model).values() for name in layer.active_adapters]
    found: dict[str, Any] = {}
    for module in model.modules():
        found.update(vars(module).get("peft_config") or {})
    return {
        name: found[name]
        for name in dict.fromkeys(active)
        if isinstance(found.get(name), MoeLoraConfig)
    }


def use_gate_rescale(model: nn.Module, mode: GateRescale, adapter: str) -> None:
    """Train an active adapter with this exponent, which its file will name."""
    active_configs(model)[adapter].gate_rescale_used = mode
    for layer in routed_layers(model).values():
        if adapter in layer.moelora_gate_rescale:
            layer.moelora_gate_rescale[adapter] = mode


def find_tuner(model: Any) -> MoeLoraModel | None:
    """The tuner inside a PeftModel (however it is wrapped), or None."""
    return next((m for m in model.modules() if isinstance(m, MoeLoraModel)), None)


def _refuse_nesting(model: nn.Module) -> None:
    """A PeftModel inside another: the inner adapter would be frozen, and saved under wrong names.

    A PeftModel of its own type takes a second adapter beside the first.
    """
    inner = next((m for m in model.modules() if isinstance(m, PeftModel | BaseTuner)), None)
    if inner is not None:
        raise ConfigError(
            f"The base is a {type(inner).__name__} already, and a mixture of experts around it "
            "would be saved and trained wrongly; put it beside the adapter that is there with "
            "`model.add_adapter(name, config)` or `model.load_adapter(folder, name)`, or first "
            "take that out with `merge_and_unload()` or `unload()`."
        )


def _own_name(name: str) -> str:
    """A module's name without what torch.compile puts before it."""
    return name.removeprefix("_orig_mod.")


def _refuse_pattern_alone(config: MoeLoraConfig) -> None:
    if config.layers_pattern and config.layers_to_transform is None:
        raise ConfigError(
            f"layers_pattern={config.layers_pattern!r} says where the layers of "
            "layers_to_transform are, which is not set; set it, or leave layers_pattern out."
        )


def _saves_biases() -> bool:
    """Whether PEFT saves the biases of every type; before 0.21 it does for those it names."""
    return Version(peft.__version__) >= Version("0.21.0.dev0")


def _refuse_sharded(model: nn.Module) -> None:
    """A base whose linears are cut over processes takes no adapter: its experts would not be.

    transformers notes its tensor parallel size on the model, from 5.6 to 5.23 except where weights
    are DTensors anyway; so are those of FSDP2 and of torch's parallelize_module.
    """
    sizes = (getattr(module, "_tp_size", None) or 1 for module in model.modules())
    weights = (parameter for parameter in model.parameters() if hasattr(parameter, "full_tensor"))
    if max(sizes) > 1 or next(weights, None) is not None:
        raise ConfigError(
            "The base model's weights are split over processes already (tensor parallelism, or "
            "sharded while loading), which MoE-LoRA layers do not support; load it whole, add the "
            "adapter, and train with DDP or FSDP2 (or DeepSpeed ZeRO stage 1 or 2)."
        )
