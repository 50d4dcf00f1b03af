"""LLaMA-Factory's classic commands: how an adapter gets onto the model.

For a mixture a MoeLoraConfig is made where LLaMA-Factory would make a LoraConfig, and for inference
the adapter is left unmerged.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel

from ... import MoeLoraConfig
from ...checkpoint import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE
from ...errors import ConfigError, ExportError
from ...targets import ALL_LINEAR
from ..options import preset_fields, refuse_disagreement, verify_adapter
from .classic import FINETUNING_TYPE, OTHER_WORDS, PREFIX, UNSET_BY_DEFAULT, Mixture

_ALL = "all"  # LLaMA-Factory's word for "all-linear"
# Keys of LLaMA-Factory that choose among the targets.
_CHOOSE_TARGETS = (
    "use_llama_pro",
    "freeze_vision_tower",
    "freeze_multi_modal_projector",
    "freeze_language_model",
)
_REFUSED_LOADERS = {
    "use_unsloth": "Unsloth builds LoRA layers of its own",
    "use_kt": "KTransformers builds LoRA layers of its own",
}


def extend() -> None:
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
    mixture: Mixture | None = getattr(call.arguments["finetuning_args"], "mixture", None)
    adapters = _saved_configs(model_args)
    mixtures = [path for path, c in adapters.items() if isinstance(c, MoeLoraConfig)]
    if mixture is None and not mixtures:
        return original(*call.args, **call.kwargs)
    for key, reason in _REFUSED_LOADERS.items():
        if getattr(model_args, key, False):
            raise ConfigError(f"{key} does not go with MoE-LoRA ({reason}); remove it.")
    for path in mixtures:
        verify_adapter(_local_folder(path, model_args))
    if trains:
        goes_on = adapters and not call.arguments["finetuning_args"].create_new_adapter
        if goes_on:
            path = model_args.adapter_name_or_path[-1]
            _check_continued(module, mixture, adapters[path], path, call)
        with _mixture_for_lora(module, mixture, call):
            try:
                return original(*call.args, **call.kwargs)
            except ExportError as error:
                key = "adapter_name_or_path" if goes_on else "create_new_adapter: true"
                which = "all adapters but the last" if goes_on else "the adapters before it"
                raise ExportError(f"{key} merges {which} into the base. {error}") from error
    for path in mixtures if mixture is not None else ():
        _check_continued(module, mixture, adapters[path], path, call)
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


def _local_folder(path: str, model_args: Any) -> Path:
    """Where an adapter's files lie; those of a hub id are downloaded, as PEFT would next."""
    within = model_args.adapter_folder or ""
    if Path(path).is_dir():
        return Path(path) / within
    options = _hub_options(model_args)
    options.pop("subfolder")
    files = [str(Path(within) / name) for name in (CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE)]
    return Path(snapshot_download(path, allow_patterns=files, **options)) / within


def _check_continued(
    module: Any,
    mixture: Mixture | None,
    saved: PeftConfig | None,
    path: str,
    call: inspect.BoundArguments,
) -> None:
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
    keys = {field: word for word, field in (UNSET_BY_DEFAULT | OTHER_WORDS).items()}
    refuse_disagreement(
        mixture.options,
        {**mixture.words, "target_modules": _stated_targets(module, mixture, call)},
        saved.to_dict(),
        path,
        lambda field: keys.get(field, PREFIX + field),
        call.arguments["model"],
    )


@contextmanager
def _mixture_for_lora(
    module: Any, mixture: Mixture | None, call: inspect.BoundArguments
) -> Iterator[None]:
    """Let LLaMA-Factory find the targets, and take our config where it makes a LoraConfig."""
    if mixture is None:
        yield
        return

    def lora_config(**lora: Any) -> MoeLoraConfig:
        targets = _targets(module, mixture, call, lora["target_modules"])
        fields = {k: lora[k] for k in ("modules_to_save", "task_type", "inference_mode")}
        config = mixture.config(**fields, target_modules=targets)
        # Nobody named what LLaMA-Factory has found.
        config.targets_by_default |= call.arguments["finetuning_args"].lora_target == [_ALL]
        module.logger.info_rank0(f"Mixture of LoRA experts: {config}")
        return config

    original, module.LoraConfig = module.LoraConfig, lora_config
    try:
        yield
    finally:
        module.LoraConfig = original


def _stated_targets(module: Any, mixture: Mixture, call: inspect.BoundArguments) -> Any:
    """What the run's keys would make a new adapter's targets; None where they name none."""
    arguments = call.arguments["finetuning_args"]
    defaults = {field.name: field.default for field in dataclasses.fields(arguments)}
    named = mixture.options.get("preset") and preset_fields(mixture.options).get("target_modules")
    chosen = any(getattr(arguments, key) != defaults[key] for key in _CHOOSE_TARGETS)
    if mixture.default_targets and not chosen and named is None:
        return None
    model, found = call.arguments["model"], arguments.lora_target
    if found == [_ALL]:
        found = module.find_all_linear_modules(model, arguments.freeze_vision_tower)
    if arguments.use_llama_pro:
        found = module.find_expanded_modules(model, found, arguments.freeze_trainable_layers)
    found = module.patch_target_modules(model, arguments, found)
    return _targets(module, mixture, call, found)


def _targets(module: Any, mixture: Mixture, call: inspect.BoundArguments, found: Any) -> Any:
    """The adapter's targets, of what LLaMA-Factory has found; None where the preset lists them."""
    preset = preset_fields(mixture.options).get("target_modules")
    if mixture.default_targets and isinstance(preset, list):
        return None
    asks_for_all = call.arguments["finetuning_args"].lora_target == [_ALL]
    return ALL_LINEAR if asks_for_all and _is_unnarrowed(module, found, call) else found


def _is_unnarrowed(module: Any, targets: Any, call: inspect.BoundArguments) -> bool:
    """Whether these are all linears, not those of the layers or towers that train.

    By their names, LLaMA-Factory's are of linears here and of fused experts there, or of what
    cannot learn; what `all` means without a choice among them is for us to find.
    """
    freezes = call.arguments["finetuning_args"].freeze_vision_tower
    return set(targets) == set(module.find_all_linear_modules(call.arguments["model"], freezes))


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
