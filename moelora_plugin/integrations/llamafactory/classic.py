"""LLaMA-Factory's classic commands: `finetuning_type: moelora` and the keys `moelora_*`.

There is no plugin point, so two things are changed when their modules have been imported:

- The dataclass of finetuning arguments, in the tables that the parser is made from, becomes a
  subclass with our keys: YAML, JSON and the command line take them, and a wrong key is still
  refused by LLaMA-Factory itself.
- The function that puts a LoRA in place is wrapped. For a mixture it makes a MoeLoraConfig where it
  would make a LoraConfig, and for inference it leaves the adapter unmerged.

Inside LLaMA-Factory the type is "lora", which its checks on adapters and on DDP go by.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args, get_type_hints

from llamafactory.extras.misc import is_env_enabled
from llamafactory.hparams.finetuning_args import FinetuningArguments
from peft import PeftConfig, PeftModel

from ... import PRESETS, MoeLoraConfig
from ...errors import ConfigError
from ..options import (
    DEFAULT_PRESET,
    adapter_config,
    option_types,
    option_value,
    preset_fields,
    refuse_disagreement,
    refuse_unknown_keys,
)

FINETUNING_TYPE = "moelora"
PREFIX = "moelora_"

# LLaMA-Factory's words for fields of MoeLoraConfig. The first three have defaults there, which our
# subclass takes out to tell what a run has set from what the preset decides.
_UNSET_BY_DEFAULT = {"lora_rank": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
_OTHER_WORDS = {"use_rslora": "use_rslora", "additional_target": "modules_to_save"}

_OFT = "it is for finetuning_type: oft"
_FREEZE = "it is for finetuning_type: freeze; additional_target names modules that train whole"

# Refused where they are set to something else than LLaMA-Factory's default.
_REFUSED = {
    "use_dora": "it is for one LoRA; moelora_expert: dora is its form for experts",
    "pissa_init": "it starts one LoRA, not a mixture; moelora_init names the ways to start one",
    "pissa_iter": "it goes with pissa_init; moelora_init names the ways to start a mixture",
    "pissa_convert": "it converts one LoRA, not a mixture",
    "loraplus_lr_ratio": "its groups know no gates; set optim: gradamw (or another of moelora's) "
    "and optim_args: lora_plus_ratio=...",
    "loraplus_lr_embedding": "it goes with loraplus_lr_ratio",
    "oft_rank": _OFT,
    "oft_block_size": _OFT,
    "oft_target": _OFT,
    "module_dropout": _OFT,
    "freeze_trainable_modules": _FREEZE,
    "freeze_extra_modules": _FREEZE,
    "use_adam_mini": "it takes the place of the optimizer that optim names",
    "use_muon": "it takes the place of the optimizer that optim names",
    "use_hyper_parallel": "that backend is for full fine-tuning only",
}
_REFUSED_BACKENDS = {
    "USE_MCA": "Megatron's adapter layers know no mixture",
    "USE_MEGATRON_BRIDGE": "Megatron's adapter layers know no mixture",
}
_REFUSED_LOADERS = {
    "use_unsloth": "Unsloth builds LoRA layers of its own",
    "use_kt": "KTransformers builds LoRA layers of its own",
}


@dataclass
class _Mixture:
    """What a run asks for.

    Attributes:
        options: fields of MoeLoraConfig that it sets in our keys, and the preset.
        words: fields of MoeLoraConfig that it sets in LLaMA-Factory's words.
        default_targets: whether it sets no `lora_target`, so that a preset's targets count.
    """

    options: dict[str, Any]
    words: dict[str, Any]
    default_targets: bool

    def config(self, **fields: Any) -> MoeLoraConfig:
        """The adapter; `fields` are what only the model can tell."""
        return adapter_config(self.options, {**self.words, **fields})


@dataclass
class _ArgumentsBase(FinetuningArguments):  # type: ignore[misc]
    """LLaMA-Factory's finetuning arguments with what ours do beyond parsing."""

    def __post_init__(self) -> None:
        options = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.startswith(PREFIX) and value is not None:
                name = field.name.removeprefix(PREFIX)
                options[name] = option_value(name, _read_json(value), field.name)
                setattr(self, field.name, options[name])
        self.mixture: _Mixture | None = None
        if self.finetuning_type == FINETUNING_TYPE:
            self._take_mixture(options)
        elif options:
            keys = ", ".join(f"{PREFIX}{key}" for key in options)
            raise ConfigError(
                f"{keys} given with finetuning_type: {self.finetuning_type}; set finetuning_type: "
                f"{FINETUNING_TYPE} or remove what begins with {PREFIX}."
            )
        for field in dataclasses.fields(FinetuningArguments):
            freed = field.name in {*_UNSET_BY_DEFAULT, "lora_target"}
            if freed and getattr(self, field.name) is None:
                setattr(self, field.name, field.default)
        super().__post_init__()

    def _take_mixture(self, options: dict[str, Any]) -> None:
        self._refuse_what_does_not_fit()
        words = {field: getattr(self, word) for word, field in _UNSET_BY_DEFAULT.items()}
        words["use_rslora"] = self.use_rslora or None
        self.mixture = _Mixture(
            options,
            {key: value for key, value in words.items() if value is not None},
            default_targets=self.lora_target is None,
        )
        config = self.mixture.config()
        for word, field in _UNSET_BY_DEFAULT.items():
            setattr(self, word, getattr(config, field))
        self.finetuning_type = "lora"

    def _refuse_what_does_not_fit(self) -> None:
        if self.stage == "ppo":
            raise ConfigError(
                f"stage: ppo builds its own optimizer and swaps adapters, which finetuning_type: "
                f"{FINETUNING_TYPE} does not support; choose pt, sft, rm, dpo or kto."
            )
        defaults = {f.name: f.default for f in dataclasses.fields(FinetuningArguments)}
        reasons = dict(_REFUSED)
        if not self.use_llama_pro:
            reasons["freeze_trainable_layers"] = f"{_FREEZE}, or goes with use_llama_pro"
        for key, reason in reasons.items():
            if getattr(self, key, None) != defaults.get(key):
                raise ConfigError(
                    f"{key} does not go with finetuning_type: {FINETUNING_TYPE} ({reason}); "
                    "remove it."
                )
        for variable, reason in _REFUSED_BACKENDS.items():
            if is_env_enabled(variable):
                raise ConfigError(
                    f"{variable} does not go with finetuning_type: {FINETUNING_TYPE} ({reason}); "
                    "unset it."
                )


def extend_arguments() -> None:
    """Put our finetuning arguments into the tables of LLaMA-Factory's parser."""
    from llamafactory.hparams import parser

    read = parser.read_args
    if not hasattr(read, "moelora"):
        parser.read_args = _read_known(read)
    for name, table in vars(parser).items():
        if name.endswith("_ARGS") and isinstance(table, list):
            table[:] = [_arguments() if entry is FinetuningArguments else entry for entry in table]


def _read_known(read: Callable[..., Any]) -> Callable[..., Any]:
    """LLaMA-Factory's reader of a file or command line, which refuses keys that only look ours.

    It would say so itself, but after it has made the arguments of the keys that it knows, or, with
    ALLOW_EXTRA_ARGS, not at all.
    """

    @functools.wraps(read)
    def read_known(*args: Any, **keywords: Any) -> Any:
        found = read(*args, **keywords)
        words = [word.partition("=")[0] for word in found if str(word).startswith("--")]
        keys = found if isinstance(found, dict) else [w.removeprefix("--") for w in words]
        known = [f.name for f in dataclasses.fields(_arguments()) if f.name.startswith(PREFIX)]
        host = {f: word for word, f in (_UNSET_BY_DEFAULT | _OTHER_WORDS).items()}
        host["target_modules"] = "lora_target"
        refuse_unknown_keys(keys, known, f"{PREFIX}{{}}".format, host)
        return found

    read_known.moelora = True  # type: ignore[attr-defined]
    return read_known


@functools.cache
def _arguments() -> type:
    """LLaMA-Factory's finetuning arguments with a key for every option it has none for."""
    hosts = {field.name: field for field in dataclasses.fields(FinetuningArguments)}
    host_hints = get_type_hints(FinetuningArguments)
    words = {*_UNSET_BY_DEFAULT.values(), *_OTHER_WORDS.values(), "target_modules"}
    fields = []
    for name, hint in option_types(words).items():
        text = f"{name} of MoeLoraConfig (default: the preset's)."
        if name == "preset":
            text = f"One of {', '.join(PRESETS)} (default: {DEFAULT_PRESET})."
        fields.append(_unset(f"{PREFIX}{name}", _argument_type(hint), text))
    for word in (*_UNSET_BY_DEFAULT, "lora_target"):
        host = hosts[word]
        text = (
            f"{host.metadata['help']} Unset: {host.default}; with {FINETUNING_TYPE} the preset's."
        )
        fields.append(_unset(word, host_hints[word] | None, text))
    kinds: Any = Literal[(*get_args(host_hints["finetuning_type"]), FINETUNING_TYPE)]
    type_field = dataclasses.field(default="lora", metadata=hosts["finetuning_type"].metadata)
    fields.append(("finetuning_type", kinds, type_field))
    return dataclasses.make_dataclass("MoeLoraArguments", fields, bases=(_ArgumentsBase,))


def _unset(name: str, kind: Any, text: str) -> tuple[str, Any, Any]:
    return name, kind, dataclasses.field(default=None, metadata={"help": text})


def _argument_type(hint: Any) -> Any:
    """The type of a key, of the few that HfArgumentParser knows.

    What is not a plain value comes from YAML as it is, and from the command line as JSON.
    """
    plain = {*(get_args(hint) or (hint,))} - {type(None)}
    if len(plain) == 1 and plain <= {int, float, bool, str}:
        return plain.pop() | None
    return dict | str | None  # in this order: the parser takes the second for the command line


def _read_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value  # a name or a regular expression


def extend_adapter() -> None:
    """Wrap the function of LLaMA-Factory that puts a LoRA in place."""
    from llamafactory.model import adapter

    original = adapter._setup_lora_tuning
    if hasattr(original, "moelora"):
        return

    @functools.wraps(original)
    def setup_lora_tuning(*args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(original).bind(*args, **kwargs)
        return _set_up(adapter, original, call)

    setup_lora_tuning.moelora = True  # type: ignore[attr-defined]
    adapter._setup_lora_tuning = setup_lora_tuning


def _set_up(module: Any, original: Callable[..., Any], call: inspect.BoundArguments) -> Any:
    """What `_setup_lora_tuning` does, for mixtures and for everything else."""
    model_args, trains = call.arguments["model_args"], call.arguments["is_trainable"]
    mixture: _Mixture | None = getattr(call.arguments["finetuning_args"], "mixture", None)
    adapters = _saved_configs(model_args)
    mixtures = [path for path, c in adapters.items() if isinstance(c, MoeLoraConfig)]
    if mixture is None and not mixtures:
        return original(*call.args, **call.kwargs)
    for key, reason in _REFUSED_LOADERS.items():
        if getattr(model_args, key, False):
            raise ConfigError(f"{key} does not go with MoE-LoRA ({reason}); remove it.")
    if trains:
        if adapters and not call.arguments["finetuning_args"].create_new_adapter:
            path = model_args.adapter_name_or_path[-1]
            _check_continued(mixture, adapters[path], path)
        with _mixture_for_lora(module, mixture):
            return original(*call.args, **call.kwargs)
    if mixtures and model_args.export_dir is None:
        module.logger.info_rank0(f"Unmerged mixtures of LoRA experts: {', '.join(mixtures)}")
        return _load_unmerged(original, call, mixtures)
    # What is left merges: `export`, which our layers refuse in a sentence unless it is exact.
    return original(*call.args, **call.kwargs)


def _saved_configs(model_args: Any) -> dict[str, PeftConfig | None]:
    """The configuration of each adapter in `adapter_name_or_path`; None where it cannot be read."""
    configs: dict[str, PeftConfig | None] = {}
    for path in model_args.adapter_name_or_path or []:
        try:
            configs[path] = PeftConfig.from_pretrained(path, **_hub_options(model_args))
        except (OSError, ValueError):  # LLaMA-Factory will fail on it in its own words
            configs[path] = None
    return configs


def _hub_options(model_args: Any) -> dict[str, Any]:
    return {
        "subfolder": model_args.adapter_folder,
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.hf_hub_token,
    }


def _check_continued(mixture: _Mixture | None, saved: PeftConfig | None, path: str) -> None:
    """The run must ask for the adapter that goes on; LLaMA-Factory would not compare them."""
    if mixture is None:
        if isinstance(saved, MoeLoraConfig):
            raise ConfigError(
                f"{path} is a mixture of LoRA experts; set finetuning_type: {FINETUNING_TYPE} to "
                "train it on."
            )
        return
    if saved is None:
        return
    if not isinstance(saved, MoeLoraConfig):
        raise ConfigError(
            f"{path} is no mixture of LoRA experts and cannot go on as one; set "
            "create_new_adapter: true to merge it and train a mixture on top."
        )
    words = {field: word for word, field in (_UNSET_BY_DEFAULT | _OTHER_WORDS).items()}
    refuse_disagreement(
        mixture.options,
        mixture.words,
        saved.to_dict(),
        path,
        lambda field: words.get(field, PREFIX + field),
    )


@contextmanager
def _mixture_for_lora(module: Any, mixture: _Mixture | None) -> Iterator[None]:
    """Let LLaMA-Factory find the targets, and take our config where it makes a LoraConfig."""
    if mixture is None:
        yield
        return

    def lora_config(**lora: Any) -> MoeLoraConfig:
        if mixture.default_targets and "target_modules" in preset_fields(mixture.options):
            lora.pop("target_modules")
        fields = ("target_modules", "modules_to_save", "task_type", "inference_mode")
        config = mixture.config(**{key: lora[key] for key in fields if key in lora})
        module.logger.info_rank0(f"Mixture of LoRA experts: {config}")
        return config

    original, module.LoraConfig = module.LoraConfig, lora_config
    try:
        yield
    finally:
        module.LoraConfig = original


def _load_unmerged(
    original: Callable[..., Any], call: inspect.BoundArguments, mixtures: list[str]
) -> Any:
    """The model with its plain adapters merged, as LLaMA-Factory does, and its mixtures beside it.

    Updates add up, so the order of the list does not matter and several mixtures work at once.
    """
    model_args = copy.copy(call.arguments["model_args"])
    plain = [path for path in model_args.adapter_name_or_path if path not in mixtures]
    if plain and getattr(call.arguments["model"], "quantization_method", None) is not None:
        raise ConfigError(
            f"{plain[0]} cannot be merged into a quantised model, which a mixture beside it needs; "
            "take it out of adapter_name_or_path or load the model unquantised."
        )
    model_args.adapter_name_or_path = plain or None
    call.arguments["model_args"] = model_args
    model = original(*call.args, **call.kwargs)
    options = {**_hub_options(model_args), "offload_folder": model_args.offload_folder}
    names = ["default", *(f"adapter_{i}" for i in range(1, len(mixtures)))]
    model = PeftModel.from_pretrained(model, mixtures[0], names[0], is_trainable=False, **options)
    for path, name in zip(mixtures[1:], names[1:], strict=True):
        model.load_adapter(path, name, is_trainable=False, **options)
    cast(Any, model.base_model).set_adapter(names)
    return model
