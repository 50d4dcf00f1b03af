"""swift's arguments as the options of a MoeLoraConfig."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import MISSING, field, fields, make_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from swift.arguments.tuner_args import TunerArguments

from ...checkpoint import CONFIG_FILE, read_adapter_config
from ...config import PEFT_TYPE, MoeLoraConfig
from ...errors import ConfigError
from ...optim import OPTIMIZERS
from ..options import (
    adapter_config,
    option_types,
    option_value,
    preset_fields,
    refuse_disagreement,
    refuse_unknown_keys,
    takes_mapping,
)

TUNER_TYPE = "moelora"
PREFIX = "moelora_"

# Fields of MoeLoraConfig that swift has arguments of its own for.
_SWIFT_WORDS = {
    "r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_rslora": "use_rslora",
    "bias": "lora_bias",
}
_FROM_THE_MODEL = {"target_modules", "modules_to_save"}

# Arguments of swift's LoRA that this adapter cannot follow, and what to do instead.
_REFUSED = {
    "use_dora": f"remove it, or use {PREFIX}expert dora",
    "target_parameters": "name linear modules in target_modules",
    "lora_dtype": "remove it",
    "init_weights": f"remove it, or use {PREFIX}init",
    "use_swift_lora": "remove it",
    "tuner_backend": "remove it",
    "lorap_lr_ratio": "use optimizer gradamw (or another of moelora's) and optim_args "
    "lora_plus_ratio=...",
    "use_galore": "remove it",
    "lisa_activated_layers": "remove it",
    "use_vllm": "remove it; vLLM knows no routers",
    **dict.fromkeys(
        (
            "freeze_parameters",
            "freeze_parameters_regex",
            "freeze_parameters_ratio",
            "trainable_parameters",
            "trainable_parameters_regex",
        ),
        "it is for tuner_type full; name modules that train whole in modules_to_save",
    ),
}
# What belongs to swift's other tuners, by how its name begins.
_OTHER_TUNERS = (
    "lora_ga_",
    "fourier_",
    "boft_",
    "vera_",
    "adapter_",
    "adalora_",
    "llamapro_",
    "reft_",
)
# The same for our optimizers.
_REFUSED_BY_OPTIMIZERS = {
    "lorap_lr_ratio": "use optim_args lora_plus_ratio=...",
    "use_galore": "remove it",
    "vit_lr": "remove it",
    "aligner_lr": "remove it",
}


def _parser_type(hint: Any) -> Any:
    for part in get_args(hint):
        if get_origin(part) is list:  # a list, or one of its members alone
            return part | None
    if takes_mapping(hint):
        return dict | str | None  # JSON on a command line
    return hint | None


# The options that swift has no arguments for, with types that its parser understands.
OPTION_TYPES = {
    name: _parser_type(hint)
    for name, hint in option_types({*_SWIFT_WORDS, *_FROM_THE_MODEL}).items()
}


class _Checked(TunerArguments):  # type: ignore[misc]
    def __post_init__(self) -> None:
        super().__post_init__()
        if _wants_our_optimizer(self):
            refuse_optimizer_conflicts(self)
        options = _options(self)
        if self.tuner_type != TUNER_TYPE:
            refuse_mixture(self)
            if options:
                raise ConfigError(
                    f"{PREFIX}{next(iter(options))} goes with tuner_type {TUNER_TYPE}, not with "
                    f"{self.tuner_type}; set that or remove it."
                )
            return
        moelora_config(self)  # what is wrong is said before the model is loaded
        for folder in _saved_adapters(self):
            refuse_other_config(self, folder)


# What all of swift's training arguments inherit, with our options. Where none is set, it does what
# swift's own does.
MoeLoraTunerArguments = make_dataclass(
    "MoeLoraTunerArguments",
    [
        (
            PREFIX + name,
            kind,
            field(
                default=None, metadata={"help": f"{name} of MoeLoraConfig; the preset's if unset"}
            ),
        )
        for name, kind in OPTION_TYPES.items()
    ],
    bases=(_Checked,),
    namespace={"__module__": __name__},
)


def moelora_config(args: Any, **from_the_model: Any) -> MoeLoraConfig:
    """The adapter that swift's arguments describe.

    Args:
        args: swift's training arguments.
        **from_the_model: fields that only the loaded model tells.

    Raises:
        ConfigError: an option that is unknown, out of range or not possible with this adapter.
    """
    defaults = _defaults()
    others = {
        name: "it belongs to another tuner; remove it"
        for name in defaults
        if name.startswith(_OTHER_TUNERS)
    }
    for name, remedy in {**_REFUSED, **others}.items():
        default = defaults.get(name, False)  # of `rlhf` alone
        # swift turns the text "true" into True on its way.
        if str(getattr(args, name, default)).lower() != str(default).lower():
            raise ConfigError(f"{name} does not go with tuner_type {TUNER_TYPE}: {remedy}.")
    words = _set_words(args)
    if _command_line() is None:  # a default may be what was meant
        words = {key: getattr(args, name) for key, name in _SWIFT_WORDS.items()}
    return adapter_config(_options(args), {**words, **from_the_model})


def targets_are_the_presets(args: Any) -> bool:
    """Whether a preset that lists target modules is to choose them: the run names none itself.

    A preset's "all-linear" is swift's own default, which leaves out a frozen vision tower.
    """
    listed = isinstance(preset_fields(_options(args)).get("target_modules"), list)
    return listed and not _names_targets(args)


def states_targets(args: Any) -> bool:
    """Whether the run says, itself or by a preset that it names, which modules are adapted."""
    options = _options(args)
    by_preset = options.get("preset") and preset_fields(options).get("target_modules") is not None
    return bool(by_preset) or _names_targets(args)


def _names_targets(args: Any) -> bool:
    named = _command_line_words() & {"target_modules", "target_regex"}
    return bool(named) or args.target_modules != _defaults()["target_modules"]


def refuse_other_type(folder: str) -> dict[str, Any]:
    """What stands in a saved adapter's config file; empty where there is none.

    Raises:
        ConfigError: it is an adapter of another type.
    """
    if not (Path(folder) / CONFIG_FILE).is_file():  # swift fails on it in its own words
        return {}
    saved = read_adapter_config(Path(folder))
    if (peft_type := saved.get("peft_type")) != PEFT_TYPE:
        raise ConfigError(
            f"{folder} holds a {peft_type} adapter, which cannot go on as a mixture of experts; "
            "set the tuner_type that it was trained with."
        )
    return saved


def refuse_mixture(args: Any) -> None:
    """Refuse to go on with an adapter of ours as one of another type, which compares nothing.

    Raises:
        ConfigError: there is one.
    """
    for folder in _saved_adapters(args):
        has_config = (Path(folder) / CONFIG_FILE).is_file()
        if has_config and read_adapter_config(Path(folder)).get("peft_type") == PEFT_TYPE:
            raise ConfigError(
                f"{folder} holds a mixture of LoRA experts; set tuner_type {TUNER_TYPE} to train "
                "it on."
            )


def refuse_other_config(args: Any, folder: str, model: Any = None, **from_the_model: Any) -> None:
    """An adapter that is trained on keeps its configuration: what is set must agree with it.

    Args:
        args: swift's training arguments.
        folder: the adapter's.
        model: the base, once it is there.
        **from_the_model: fields that the run states and that only the base tells.

    Raises:
        ConfigError: it is an adapter of another type, or was trained with other values.
    """
    saved = refuse_other_type(folder)
    if not saved:
        return
    target = "target_regex" if args.target_regex else "target_modules"
    keys = {**_SWIFT_WORDS, "target_modules": target, "modules_to_save": "modules_to_save"}
    refuse_disagreement(
        _options(args),
        {**_set_words(args), **from_the_model},
        saved,
        folder,
        lambda field: keys.get(field, PREFIX + field),
        model,
    )


def _saved_adapters(args: Any) -> list[str]:
    """The adapters that a training goes on from."""
    return [folder for folder in (args.resume_from_checkpoint, *args.adapters) if folder]


def _wants_our_optimizer(args: Any) -> bool:
    return args.optimizer in OPTIMIZERS or getattr(args.optim, "value", args.optim) in OPTIMIZERS


def refuse_optimizer_conflicts(args: Any) -> None:
    """Refuse arguments that ask for another optimizer than ours at the same time.

    Raises:
        ConfigError: there is one.
    """
    for name, remedy in _REFUSED_BY_OPTIMIZERS.items():
        if getattr(args, name, None):
            raise ConfigError(f"{name} does not go with moelora's optimizers: {remedy}.")


def refuse_unreadable_options() -> None:
    """Say how to pass options where swift's command line has no fields for them.

    Raises:
        ConfigError: the command line names one.
    """
    from swift.arguments import SftArguments

    if issubclass(SftArguments, MoeLoraTunerArguments):
        return
    for word in sys.argv[1:]:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name.startswith(PREFIX):
            raise ConfigError(
                f"--{name} is not known to swift, as moelora's import hooks are off; pass "
                f"""--model_kwargs '{{"{name}": ...}}', or start with `moelora launch swift ...`."""
            )


def _options(args: Any) -> dict[str, Any]:
    """Our options by their names in MoeLoraConfig."""
    refuse_unknown_keys(
        {*(_command_line() or ()), *(args.model_kwargs or {})},
        [PREFIX + name for name in OPTION_TYPES],
        f"{PREFIX}{{}}".format,
        {**_SWIFT_WORDS, **{name: name for name in _FROM_THE_MODEL}},
    )
    options = {
        key.removeprefix(PREFIX): value
        for key, value in (args.model_kwargs or {}).items()
        if key.startswith(PREFIX)
    }
    for name in OPTION_TYPES:
        value = getattr(args, PREFIX + name, None)
        if value is not None and options.setdefault(name, value) != value:
            raise ConfigError(
                f"{PREFIX}{name} is {value!r}, and {options[name]!r} in model_kwargs; remove one "
                "of the two."
            )
    return {name: option_value(name, value, PREFIX + name) for name, value in options.items()}


def _set_words(args: Any) -> dict[str, Any]:
    """What was set in swift's words, which its dataclasses do not tell from a default."""
    named, defaults = _command_line() or set(), _defaults()
    return {
        key: getattr(args, name)
        for key, name in _SWIFT_WORDS.items()
        if name in named or getattr(args, name) != defaults[name]
    }


def _command_line() -> set[str] | None:
    """The arguments that the command line names, or the YAML file: swift puts it there.

    None where the arguments come from Python code.
    """
    names = _command_line_words()
    return names if "tuner_type" in names else None


def _command_line_words() -> set[str]:
    ray = os.environ.get("RAY_SWIFT_ARGS")
    words = json.loads(ray) if ray else sys.argv[1:]
    return {
        word.partition("=")[0].removeprefix("--").replace("-", "_")
        for word in words
        if word.startswith("--")
    }


def _defaults() -> dict[str, Any]:
    from swift.arguments import SftArguments

    return {
        f.name: f.default_factory() if f.default_factory is not MISSING else f.default
        for f in fields(SftArguments)
        if f.default is not MISSING or f.default_factory is not MISSING
    }
