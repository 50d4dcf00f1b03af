"""LLaMA-Factory's classic commands: `finetuning_type: moelora` and the keys `moelora_*`.

There is no plugin point, so two things are changed when their modules have been imported:

- The dataclass of finetuning arguments, in the tables that the parser is made from, becomes a
  subclass with our keys: YAML, JSON and the command line take them, and a wrong key is still
  refused by LLaMA-Factory itself.
- The function that puts a LoRA in place is wrapped, in `classic_adapter`.

Inside LLaMA-Factory the type is "lora", which its checks on adapters and on DDP go by.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from llamafactory.extras.misc import is_env_enabled
from llamafactory.hparams.finetuning_args import FinetuningArguments

from ... import PRESETS, MoeLoraConfig
from ...errors import ConfigError
from ..options import (
    DEFAULT_PRESET,
    adapter_config,
    option_types,
    option_value,
    refuse_unknown_keys,
)

FINETUNING_TYPE = "moelora"
PREFIX = "moelora_"

# LLaMA-Factory's words for fields of MoeLoraConfig. The first have defaults there, which our
# subclass takes out to tell what a run has set from what the preset or a saved adapter decides.
UNSET_BY_DEFAULT = {
    "lora_rank": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_rslora": "use_rslora",
}
OTHER_WORDS = {"additional_target": "modules_to_save", "lora_target": "target_modules"}

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


@dataclass
class Mixture:
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
        self.mixture: Mixture | None = None
        if self.finetuning_type == FINETUNING_TYPE:
            self._take_mixture(options)
        elif options:
            keys = ", ".join(f"{PREFIX}{key}" for key in options)
            raise ConfigError(
                f"{keys} given with finetuning_type: {self.finetuning_type}; set finetuning_type: "
                f"{FINETUNING_TYPE} or remove what begins with {PREFIX}."
            )
        for field in dataclasses.fields(FinetuningArguments):
            freed = field.name in {*UNSET_BY_DEFAULT, "lora_target"}
            if freed and getattr(self, field.name) is None:
                setattr(self, field.name, field.default)
        super().__post_init__()

    def _take_mixture(self, options: dict[str, Any]) -> None:
        self._refuse_what_does_not_fit()
        words = {field: getattr(self, word) for word, field in UNSET_BY_DEFAULT.items()}
        if self.additional_target:  # LLaMA-Factory makes a list of it next
            words["modules_to_save"] = [n.strip() for n in self.additional_target.split(",")]
        self.mixture = Mixture(
            options,
            {key: value for key, value in words.items() if value is not None},
            default_targets=self.lora_target is None,
        )
        config = self.mixture.config()
        for word, field in UNSET_BY_DEFAULT.items():
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
        host = {f: word for word, f in (UNSET_BY_DEFAULT | OTHER_WORDS).items()}
        refuse_unknown_keys(keys, known, f"{PREFIX}{{}}".format, host)
        return found

    read_known.moelora = True  # type: ignore[attr-defined]
    return read_known


@functools.cache
def _arguments() -> type:
    """LLaMA-Factory's finetuning arguments with a key for every option it has none for."""
    hosts = {field.name: field for field in dataclasses.fields(FinetuningArguments)}
    host_hints = get_type_hints(FinetuningArguments)
    words = {*UNSET_BY_DEFAULT.values(), *OTHER_WORDS.values()}
    fields = []
    for name, hint in option_types(words).items():
        text = f"{name} of MoeLoraConfig (default: the preset's)."
        if name == "preset":
            text = f"One of {', '.join(PRESETS)} (default: {DEFAULT_PRESET})."
        fields.append(_unset(f"{PREFIX}{name}", _argument_type(hint), text))
    for word in (*UNSET_BY_DEFAULT, "lora_target"):
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
