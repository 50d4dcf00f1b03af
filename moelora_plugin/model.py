"""MoeLoraModel: the PEFT tuner that puts MoeLoraLinear in place of the target modules."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, cast

from accelerate import init_empty_weights
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from .allocation import ALLOCATIONS
from .config import MoeLoraConfig
from .errors import ConfigError
from .initialization import INITIALIZATIONS
from .layers import AuxLosses, MoeLoraLinear, RoutedLayer, Shared
from .layers.block import blocks_of
from .layers.first_step import FirstStep
from .layers.sites import SITES, Site
from .lookup import lookup, with_options
from .targets import choose_targets
from .types import GateRescale, Place


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
        # The constructor injects the first adapter, whose layers share this.
        self.shared = Shared()
        self._sites: dict[str, Site] = {}
        super().__init__(model, *args, **kwargs)

    @property
    def aux_losses(self) -> AuxLosses:
        """How much auxiliary losses weigh."""
        return self.shared.aux_losses

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted model's; called, where PEFT before 0.21 bypasses the model's hooks."""
        return self.model(*args, **kwargs)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """PEFT's own, once the targets are settled; then what the layers share is set up."""
        config = self.config_of(adapter_name)
        choose_targets(
            model,
            config,
            self.target_module_mapping,
            self.get_model_config(model).get("model_type"),
            is_saved=config.from_file
            or config.inference_mode
            or kwargs.get("state_dict") is not None,
        )
        tuned = [n for n, m in model.named_modules() if isinstance(m, RoutedLayer)]
        self._places = places(
            name
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
        self.shared.call.watch(model)
        if not config.inference_mode:
            FirstStep(adapter_name).watch(model)
        text = _text_modules(model)
        for layer in routed_layers(model).values():
            layer.sees_images = text is not None and layer not in text

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        """Say what is wrong with the base before PEFT says less, or nothing."""
        assert isinstance(config, MoeLoraConfig)
        _refuse_sharded(model)

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
        place = self._places[current_key]
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
                if self._check_target_module_exists(config, name)
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

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's own, which passes over modules inside others of ours: blocks lose it here."""
        super().delete_adapter(adapter_name)
        for ffn, block in blocks_of(self.model):
            block.delete_adapter(adapter_name)
            block.set_adapter(self.active_adapters)
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
        # Our hooks would take the ids of an adapter that is added next. By owner, since a copy of
        # the model has no handles of its own.
        for hooks in (self.model._forward_pre_hooks, self.model._forward_hooks):
            for key in [k for k, hook in hooks.items() if self._is_ours(_owner(hook))]:
                del hooks[key]
        return self.model

    def _is_ours(self, owner: Any) -> bool:
        return owner is self.shared.call or isinstance(owner, FirstStep)

    def _refuse_partial_merge(self, adapter_names: list[str] | None) -> None:
        """Ask every layer before the first is touched.

        Raises:
            ExportError: a layer cannot be merged.
        """
        for layer in moelora_layers(self.model).values():
            for adapter in adapter_names or layer.active_adapters:
                if adapter in layer.moelora_mixture and adapter not in layer.merged_adapters:
                    layer.refuse_merge(adapter)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's own casts parameters; frozen experts and offsets meet those in products."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            return
        for layer in routed_layers(self.model).values():
            layer.widen_buffers(adapter_name)

    def config_of(self, adapter: str) -> MoeLoraConfig:
        """The adapter's configuration."""
        return cast(MoeLoraConfig, self.peft_config[adapter])

    def set_gate_rescale(self, mode: GateRescale, adapter: str) -> None:
        """Fix the backward exponent of an adapter; its config records the value that was used."""
        self.config_of(adapter).gate_rescale = mode
        for layer in routed_layers(self).values():
            if adapter in layer.moelora_gate_rescale:
                layer.moelora_gate_rescale[adapter] = mode


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


def find_tuner(model: Any) -> MoeLoraModel | None:
    """The tuner inside a PeftModel (however it is wrapped), or None."""
    return next((m for m in model.modules() if isinstance(m, MoeLoraModel)), None)


def _text_modules(model: Any) -> set[nn.Module] | None:
    """The modules of a vision model that see the text's tokens; None of a model without images."""
    if getattr(getattr(model, "config", None), "vision_config", None) is None:
        return None
    parts: list[Any] = [model.get_decoder(), model.get_output_embeddings()]
    return {module for part in parts if part is not None for module in part.modules()}


def _owner(hook: Any) -> Any:
    return getattr(hook, "__self__", None)


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
