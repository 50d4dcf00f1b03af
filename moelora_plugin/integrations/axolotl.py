"""axolotl's plugin: `adapter: moelora`, `moelora: {...}` and `optimizer: gradamw`.

    plugins: [moelora_plugin.integrations.axolotl.MoeLoraPlugin]

axolotl imports the plugin in every process before it validates the config, so it works with the
entry point switched off as well.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel, create_model, model_validator
from transformers import set_seed

from .. import MoeLoraConfig, autoload
from ..checkpoint import CONFIG_FILE, read_adapter_config, resolve_adapter
from ..config import PEFT_TYPE
from ..errors import ConfigError, ExportError
from ..hf_trainer import optimizer_arguments
from ..lookup import unknown_name_message
from ..optim import OPTIMIZERS
from ..targets import ALL_LINEAR
from .options import (
    adapter_config,
    option_types,
    option_value,
    preset_fields,
    refuse_disagreement,
    refuse_unknown_keys,
    verify_adapter,
)

ADAPTER = "moelora"

# axolotl's own words for fields of MoeLoraConfig.
_HOST_WORDS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_layers_pattern": "layers_pattern",
    "peft_use_rslora": "use_rslora",
    "peft_trainable_token_indices": "trainable_token_indices",
}
_OWN_WORDS = {ours: theirs for theirs, ours in _HOST_WORDS.items()}

_KERNEL = "the kernel computes plain LoRA layers"
_QUANTISED = "axolotl quantises the base for adapter lora and qlora only"
_RELORA = "ReLoRA merges the adapter into the base, and a routed adapter is no weight update"
_REWARD = "moelora adapts causal language models here"

# Keys that axolotl reads for its own adapters alone, and would ignore or misapply with ours.
_REFUSED_WITH_ADAPTER = {
    "load_in_8bit": _QUANTISED,
    "load_in_4bit": _QUANTISED,
    "lora_mlp_kernel": _KERNEL,
    "lora_qkv_kernel": _KERNEL,
    "lora_o_kernel": _KERNEL,
    "lora_embedding_kernel": _KERNEL,
    "lora_target_parameters": "experts need linear modules; name them in lora_target_modules",
    "lora_rank_pattern": "moelora.allocation spreads ranks over the modules",
    "lora_alpha_pattern": "moelora.allocation spreads alphas over the modules",
    "lora_on_cpu": "it serves merging, which a routed adapter has not",
    "peft": "LoftQ initialises plain LoRA; moelora.init names an initialisation of experts",
    "peft_use_dora": "it is for one LoRA; moelora.expert: dora is its form for experts",
    "peft_init_lora_weights": "moelora.init names the initialisation of experts",
    "peft_layer_replication": "it is a feature of plain LoRA",
    "peft_ensure_weight_tying": "it ties plain LoRA's weights",
    "lora_fan_in_fan_out": "the layers find out for themselves",
    "qlora_sharded_model_loading": _QUANTISED,
    "quantize_moe_experts": _QUANTISED,
    "loraplus_lr_ratio": "its groups know no gates; set optimizer: gradamw (or another of "
    "moelora's) and optim_args: {lora_plus_ratio: ...}",
    "loraplus_lr_embedding": "it goes with loraplus_lr_ratio",
    "unfrozen_parameters": "it freezes all others, the adapter's too; name modules that train "
    "whole in lora_modules_to_save",
    "lisa_n_layers": "LISA trains layers of the base in turn",
    "relora": _RELORA,
    "relora_prune_ratio": _RELORA,
    "relora_cpu_offload": _RELORA,
    "jagged_restart_steps": _RELORA,
    "reward_model": _REWARD,
    "process_reward_model": _REWARD,
}

# Modifiers that count how many tokens each expert gets.
_COUNTING = ("balance_bias",)

_RATES = "the optimizer takes the model's own groups"

# Keys that make axolotl build the optimizer from parameter groups of its own.
_REFUSED_WITH_OPTIMIZER = {
    "loraplus_lr_ratio": "set optim_args: {lora_plus_ratio: ...}",
    "embedding_lr": _RATES,
    "embedding_lr_scale": _RATES,
    "lr_groups": f"{_RATES}; optim_args: {{gate_lr: ...}} sets the routers' rate",
}


class _Options(BaseModel):
    """Answers an unknown key with the nearest ones."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            raise ConfigError(f"moelora={data!r} must map names to values.")
        for key in data:
            if key not in cls.model_fields:
                raise ConfigError(unknown_name_message("key of moelora:", key, cls.model_fields))
        return data


def _options_model() -> type[_Options]:
    """The keys of `moelora:`: MoeLoraConfig's own fields, and `preset`. None means not set."""
    keys: dict[str, Any] = {n: (hint | None, None) for n, hint in option_types(()).items()}
    return create_model("MoeLoraOptions", __base__=_Options, **keys)


MoeLoraOptions = _options_model()


class MoeLoraArgs(BaseModel):
    """What the plugin adds to axolotl's config, and what it refuses in it."""

    moelora: MoeLoraOptions | None = None  # type: ignore[valid-type]

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        refuse_unknown_keys(data, [ADAPTER], "moelora.{}".format, _OWN_WORDS)
        if data.get("adapter") == ADAPTER:
            _refuse_keys(data, f"adapter: {ADAPTER}", _REFUSED_WITH_ADAPTER)
            _refuse_uses(data)
        elif data.get("moelora"):
            raise ConfigError(f"moelora: needs adapter: {ADAPTER}, got {data.get('adapter')!r}.")
        if data.get("optimizer") in OPTIMIZERS:
            _refuse_keys(data, f"optimizer: {data['optimizer']}", _REFUSED_WITH_OPTIMIZER)
            if isinstance(data.get("optim_args"), Mapping):
                optimizer_arguments(data["optim_args"])
        return data

    @model_validator(mode="after")
    def _try_config(self) -> MoeLoraArgs:
        config: Any = self  # axolotl's config inherits from this class
        if config.adapter == ADAPTER:
            adapter = _adapter_config(config)
            if config.sample_packing:
                _refuse_packing(config, adapter)
        return self


class MoeLoraPlugin(BasePlugin):  # type: ignore[misc]
    """The adapter `moelora` and the names of our optimizers, for axolotl."""

    def register(self, cfg: Any) -> None:
        """Activate moelora, and say which dropout holds where the file names none.

        axolotl's own validation, which follows, would say 0.

        Raises:
            AdapterError: `lora_model_dir` holds no adapter.
        """
        autoload.activate()
        if cfg.get("adapter") == ADAPTER and cfg.get("lora_dropout") is None:
            cfg["lora_dropout"] = _unset_dropout(cfg)

    def get_input_args(self) -> str:
        """Where axolotl finds the keys that it does not know."""
        return f"{MoeLoraArgs.__module__}.{MoeLoraArgs.__name__}"

    def get_adapter_capabilities(self) -> list[Any]:
        """The adapter's name; not LoRA-like, which would build PEFT's LoraConfig."""
        return [AdapterCapabilities(name=ADAPTER)]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, Any] | None:
        """The adapted model and its config; None for other adapters.

        Args:
            model: the base.
            cfg: axolotl's config; its `lora_model_dir` names an adapter to go on with.
            inference: leave the adapter frozen.
            config_only: TRL's trainer adapts the model itself (DPO, IPO, KTO).

        Raises:
            ConfigError: the config cannot be carried out on this model, or `lora_model_dir` holds
                another adapter than it asks for.
            AdapterError: `lora_model_dir` holds no adapter, or one that was changed since.
        """
        if cfg.adapter != ADAPTER:
            return None
        config = _adapter_config(cfg)
        if cfg.seed is not None:  # axolotl seeds its trainer, which comes after the experts
            set_seed(cfg.seed)
        if config_only:
            return None, config
        keywords = {}
        if cfg.peft_autocast_adapter_dtype is not None:
            keywords["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
        if cfg.lora_model_dir:
            _refuse_other_adapter(cfg, model)
            adapted: PeftModel = PeftModel.from_pretrained(
                model, cfg.lora_model_dir, is_trainable=not inference, **keywords
            )
        else:
            adapted = get_peft_model(model, config, **keywords)
        if cfg.local_rank == 0:
            adapted.print_trainable_parameters()
        return adapted, adapted.peft_config["default"]


def register_merge() -> None:
    """Make merge-lora refuse an adapter of ours, whatever the config calls it.

    Shard by shard it looks for LoRA's tensors, finds none, and writes the base as the merged model.
    """
    from axolotl.cli import merge_lora

    merge = merge_lora.merge_lora_sharded_efficient
    if hasattr(merge, "moelora"):
        return

    @functools.wraps(merge)
    def merge_others(*args: Any, **keywords: Any) -> Any:
        folder = inspect.signature(merge).bind(*args, **keywords).arguments["lora_adapter_path"]
        file = Path(folder) / CONFIG_FILE
        if file.is_file() and read_adapter_config(Path(folder)).get("peft_type") == PEFT_TYPE:
            raise _no_shard_merge(folder)
        return merge(*args, **keywords)

    merge_others.moelora = True  # type: ignore[attr-defined]
    merge_lora.merge_lora_sharded_efficient = merge_others


def register_lora() -> None:
    """Make `adapter: lora` refuse to go on with an adapter of ours, whose keys it would not read.

    axolotl loads whatever `lora_model_dir` holds, and compares nothing with it.
    """
    from axolotl.loaders import adapter

    load = adapter.load_lora
    if hasattr(load, "moelora"):
        return

    @functools.wraps(load)
    def load_others(model: Any, cfg: Any, *args: Any, **keywords: Any) -> Any:
        folder = cfg.lora_model_dir
        if folder and read_adapter_config(resolve_adapter(folder)).get("peft_type") == PEFT_TYPE:
            raise ConfigError(
                f"lora_model_dir={str(folder)!r} holds a mixture of LoRA experts; set adapter: "
                f"{ADAPTER}, and plugins to a list with {MoeLoraPlugin.__module__}."
                f"{MoeLoraPlugin.__name__}."
            )
        return load(model, cfg, *args, **keywords)

    load_others.moelora = True  # type: ignore[attr-defined]
    adapter.load_lora = load_others


def _no_shard_merge(folder: Any) -> ExportError:
    return ExportError(
        "axolotl's merge-lora reads plain LoRA files, and a routed adapter is no weight update; "
        f"write an approximation with `moelora export {folder} --to merged --strategy mean-gate "
        "--out DIR` (an adapter of one expert merges with adapter: moelora and merge_method: "
        "legacy)."
    )


def _adapter_config(cfg: Any) -> MoeLoraConfig:
    """What the file asks for."""
    words, options = _words(cfg), _options(cfg)
    for field in options.keys() & words.keys():
        if options[field] != words[field]:
            raise ConfigError(
                f"{_word_of(cfg, field)} and moelora.{field} name different values, "
                f"{words[field]!r} and {options[field]!r}; remove one of the two."
            )
    return adapter_config(options, words)


def _word_of(cfg: Any, field: str) -> str:
    """The key that sets a field of MoeLoraConfig."""
    if field == "target_modules" and cfg.lora_target_linear:
        return "lora_target_linear"
    return _OWN_WORDS.get(field, f"moelora.{field}")


def _words(cfg: Any) -> dict[str, Any]:
    """What is set in axolotl's own words.

    `lora_target_linear` stays a word: axolotl would make names of it, of which some are no names of
    linears alone and some are of linears that cannot learn.
    """
    words = {ours: getattr(cfg, theirs, None) for theirs, ours in _HOST_WORDS.items()}
    if getattr(cfg, "lora_target_linear", None):
        listed = words["target_modules"] or []
        listed = [listed] if isinstance(listed, str) else listed
        words["target_modules"] = [ALL_LINEAR, *listed] if listed else ALL_LINEAR
    return {key: value for key, value in words.items() if value not in (None, [])}


def _options(cfg: Any) -> dict[str, Any]:
    """What is set under `moelora:`."""
    return {k: option_value(k, v) for k, v in dict(cfg.moelora or {}).items() if v is not None}


def _unset_dropout(cfg: Any) -> float:
    """That of the adapter which is gone on with, or else the preset's."""
    if cfg.get("lora_model_dir"):
        saved = read_adapter_config(resolve_adapter(cfg["lora_model_dir"]))
        return float(saved.get("lora_dropout", 0.0))
    options = cfg.get("moelora")
    options = options if isinstance(options, Mapping) else {}
    if options.get("lora_dropout") is not None:
        return float(options["lora_dropout"])
    try:
        fields = preset_fields(options)
    except ConfigError:  # the validation, which follows, says what is wrong
        fields = {}
    return float(fields.get("lora_dropout", MoeLoraConfig.lora_dropout))


def _refuse_other_adapter(cfg: Any, model: Any) -> None:
    """An adapter that is gone on with keeps its configuration: what is set must agree with it."""
    folder = cfg.lora_model_dir
    saved = read_adapter_config(resolve_adapter(folder))
    if saved.get("peft_type") != PEFT_TYPE:
        raise ConfigError(
            f"lora_model_dir={folder!r} holds a {saved.get('peft_type')} adapter, not a mixture of "
            "experts; set adapter to its own kind."
        )
    verify_adapter(resolve_adapter(folder))
    refuse_disagreement(
        _options(cfg),
        _words(cfg),
        saved,
        folder,
        lambda field: _word_of(cfg, field),
        model,
    )


def _refuse_keys(data: Mapping[str, Any], with_what: str, reasons: Mapping[str, str]) -> None:
    for key, reason in reasons.items():
        if data.get(key):
            raise ConfigError(f"{key} does not go with {with_what} ({reason}); remove it.")


def _refuse_uses(data: Mapping[str, Any]) -> None:
    continued = data.get("lora_model_dir")
    if data.get("merge_lora") and data.get("merge_method") != "legacy":
        raise _no_shard_merge(continued or data.get("output_dir"))
    if data.get("inference") and not continued:
        raise ConfigError("lora_model_dir is not set; name the adapter to answer with.")
    if data.get("rl") in ("dpo", "ipo", "kto") and continued:
        raise ConfigError(
            f"axolotl's trainer for rl: {data['rl']} starts a new adapter and would ignore "
            "lora_model_dir; remove it, or name a base_model that holds the adapter (`moelora "
            "export`)."
        )


def _refuse_packing(cfg: Any, adapter: MoeLoraConfig) -> None:
    """Refuse what packed rows would get wrong.

    Position ids start anew with each document, and with the padding at the end, so that each has
    its own decision. Where attention keeps documents apart axolotl drops the mask, and padding
    cannot be told from text.
    """
    counted = (
        [f"moelora.aux_losses ({', '.join(adapter.aux_losses)})"] if adapter.aux_losses else []
    )
    counted += [
        f"moelora.router_modifiers ({name})"
        for name in _COUNTING
        if name in adapter.router_modifiers
    ]
    if counted:
        raise ConfigError(
            "With sample_packing axolotl drops the mask that tells padding from text, which "
            f"{counted[0]} must leave out; remove one of the two (a preset's by setting it to "
            "null)."
        )
    if adapter.router_input in ("token", "none"):
        return
    if adapter.router_input not in ("sequence", "prompt"):
        raise ConfigError(
            f"sample_packing puts several sequences into one row, which has one id for "
            f"moelora.router_input {adapter.router_input}; remove one of the two."
        )
    if cfg.pretrain_multipack_attn is False:
        raise ConfigError(
            "pretrain_multipack_attn: false does not tell where a packed sequence ends, and "
            f"moelora.router_input {adapter.router_input} decides once for each; remove one of the "
            "two."
        )
