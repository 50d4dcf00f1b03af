"""LLaMA-Factory v1 (`USE_V1=1`): `peft_config: {name: moelora}`, `optim_config: {name: gradamw}`.

v1 looks adapters, optimizers, templates and converters up in registries, so all but two things are
registrations: its trainer has no place for a further callback, and its `merge` knows one adapter.

The registry of 0.9.5 is one for all families, so no two of our names may be the same; that of 0.9.6
is one per family, and passes the adapter's options as `peft_config`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import PeftModel, TaskType, get_peft_model

from ...checkpoint import CONFIG_FILE, read_adapter_config, resolve_adapter
from ...config import PEFT_TYPE, MoeLoraConfig
from ...errors import ConfigError, ExportError, MissingDependencyError
from ...hf_trainer import optimizer_arguments
from ...model import active_configs, find_tuner
from ...optim import OPTIMIZERS, RiemannianAdamW, build_optimizer
from ..options import adapter_config, refuse_disagreement, verify_adapter

ADAPTER = "moelora"
TEXT = "moelora_text"

# Where OptimizerPlugin is, in 0.9.5 and in 0.9.6.
OPTIMIZER_MODULES = (
    "llamafactory.v1.plugins.trainer_plugins.optimizer",
    "llamafactory.v1.plugins.trainer_plugins.optimizers.optimizer",
)

_SCORES = "ForTokenClassification"
_NAME_LISTS = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save")
_NUMBERS = {f.name for f in fields(MoeLoraConfig) if type(f.default) in (int, float)}


def register_adapter() -> None:
    """Make v1 know `peft_config: {name: moelora}`, and its own LoRA say what to do instead."""
    from llamafactory.v1.plugins.model_plugins import peft

    peft.PeftPlugin(ADAPTER).register()(adapted_model)
    load = peft.load_adapter
    if not hasattr(load, "moelora"):
        peft.load_adapter = _load_of_plain_lora(load)
    merge = peft.merge_and_export_model
    if not hasattr(merge, "moelora"):
        peft.merge_and_export_model = _merge_that_explains(merge, peft.get_args)


def register_optimizers() -> None:
    """Make v1 know `optim_config: {name: gradamw}` and its sisters."""
    for name in OPTIMIZER_MODULES:
        module: Any = sys.modules.get(name)
        if module is not None:
            for optimizer in OPTIMIZERS:
                module.OptimizerPlugin(optimizer).register()(optimizer_of)


def register_text() -> None:
    """Make v1 know `template: moelora_text`.

    Raises:
        MissingDependencyError: this version registers templates in another way than 0.9.5.
    """
    from llamafactory.v1.plugins.model_plugins import rendering

    plugin = rendering.RenderingPlugin(TEXT)
    try:
        plugin.register("render_messages")(render_text)
        plugin.register("parse_message")(parse_text)
    except TypeError as error:
        raise MissingDependencyError(
            f"template {TEXT} is not there, since this LLaMA-Factory registers templates in "
            "another way than 0.9.5; set template to one of its own."
        ) from error
    # v1 looks for a template's module in its own package first, and warns.
    rendering.RenderingPlugin._attempted_template_imports.add(TEXT)


def register_converter() -> None:
    """Make v1 know `converter: moelora_text` for rows {"prompt", "completion"}."""
    from llamafactory.v1.plugins.data_plugins import converter

    converter.DataConverterPlugin(TEXT).register()(prompt_and_completion)


def register_trainer() -> None:
    """Make v1's trainers watch the adapter, and scale and log its auxiliary losses.

    A trainer makes its own list of callbacks, and its commands pass none on.
    """
    from llamafactory.v1.core.base_trainer import BaseTrainer

    fit = BaseTrainer.fit
    if hasattr(fit, "moelora"):
        return

    @functools.wraps(fit)
    def fit_with_callbacks(trainer: Any, *args: Any, **keywords: Any) -> Any:
        tuner = find_tuner(trainer.model)
        if tuner is not None:
            from .v1_callbacks import aux_loss_callback, guard_callback, refuse_other_checkpoint

            refuse_other_checkpoint(trainer)
            callbacks = trainer.callback_handler.callbacks
            callbacks.append(guard_callback())
            if any(config.aux_losses for config in active_configs(trainer.model).values()):
                callbacks.insert(0, aux_loss_callback(tuner))  # before that which writes the log
        return fit(trainer, *args, **keywords)

    fit_with_callbacks.moelora = True  # type: ignore[attr-defined]
    BaseTrainer.fit = fit_with_callbacks


def adapted_model(
    model: Any,
    config: Mapping[str, Any] | None = None,
    is_train: bool = False,
    *,
    peft_config: Mapping[str, Any] | None = None,
) -> Any:
    """The model with a new adapter, or with the one in `adapter_name_or_path`, unmerged.

    Args:
        model: the base.
        config: the YAML's `peft_config`: `preset` and fields of MoeLoraConfig.
        is_train: False for chat.
        peft_config: the same, as 0.9.6 passes it.

    Raises:
        ConfigError: an unknown key, a value out of range, an adapter that this cannot load, or one
            that was trained with other values than the run asks for.
    """
    options = dict(config if config is not None else peft_config or {})
    options.pop("name", None)
    path = options.pop("adapter_name_or_path", None)
    options = {key: _value(key, value) for key, value in options.items()}
    new = adapter_config(
        options,
        # The reward model of `rm`; PEFT then trains and saves its score head as well.
        {"task_type": "TOKEN_CLS"} if type(model).__name__.endswith(_SCORES) else None,
    )
    if getattr(model, "_init_mode", None) == "init_on_meta":
        raise ConfigError(
            f"peft_config: {ADAPTER} cannot start from a base without weights; remove "
            "init_config: {name: init_on_meta}."
        )
    if path:
        folder = _adapter_folder(path)
        saved = read_adapter_config(folder)
        key_of = "peft_config's {}".format
        refuse_disagreement(options, {}, saved, folder, key_of, model)
        if new.task_type == TaskType.TOKEN_CLS and saved.get("task_type") != new.task_type:
            raise ConfigError(
                f"adapter_name_or_path={str(folder)!r} was not trained as a reward model and has "
                "no head for scores; remove it to train a new adapter with one."
            )
        return PeftModel.from_pretrained(model, str(folder), is_trainable=is_train)
    if not is_train:
        raise ConfigError(
            "peft_config: without adapter_name_or_path there is no adapter to load; set it to the "
            "folder of a trained one, or remove peft_config to use the base alone."
        )
    adapted = get_peft_model(model, new)
    adapted.print_trainable_parameters()
    return adapted


def optimizer_of(
    model: Any,
    config: Mapping[str, Any] | None = None,
    *,
    optim_config: Mapping[str, Any] | None = None,
) -> Any:
    """The optimizer that `optim_config` names, over an adapted model however it is wrapped.

    Args:
        model: the model, in a DistributedDataParallel, sharded by FSDP2, or neither.
        config: the YAML's `optim_config`: `name` and keyword arguments of `build_optimizer`.
        optim_config: the same, by keyword.

    Raises:
        ConfigError: an unknown key or a bad value, or an engine that `build_optimizer` refuses.
    """
    options = dict(config if config is not None else optim_config or {})
    name = options.pop("name")
    keywords: dict[str, Any] = {}
    if "lr" not in options:
        raise ConfigError(
            "optim_config: set lr; v1's learning_rate is for its built-in optimizer only."
        )
    for key in ("lr", "weight_decay", "eps"):
        if key in options:
            keywords[key] = _required_number(key, options.pop(key))
    if "betas" in options:
        keywords["betas"] = _betas(options.pop("betas"))
    if OPTIMIZERS[name].optimizer is not RiemannianAdamW:
        for key in ("betas", "eps"):
            if key in keywords:
                raise ConfigError(f"optim_config: {name} has no {key}; remove it.")
    keywords |= optimizer_arguments(options, source="optim_config", set_by={})
    return build_optimizer(model, name, **keywords)


def prompt_and_completion(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row {"prompt", "completion"} as v1's messages.

    Raises:
        ConfigError: the row has other columns.
    """
    if not {"prompt", "completion"} <= set(row):
        raise ConfigError(
            f"converter {TEXT} needs the columns prompt and completion, and the data has "
            f"{', '.join(row)}; choose another converter."
        )
    return {
        "messages": [
            {"role": role, "content": [{"type": "text", "value": row[column]}]}
            for role, column in (("user", "prompt"), ("assistant", "completion"))
        ]
    }


def render_text(
    processor: Any,
    messages: list[dict[str, Any]],
    tools: str | None = None,
    is_generate: bool = False,
    enable_thinking: bool = False,
) -> dict[str, Any]:
    """Messages without any template: the texts themselves, each answer ended by EOS.

    The tokens are those that `moelora eval` scores; the loss is on the last answer and its EOS.

    Args:
        processor: the tokenizer, or what holds it.
        messages: v1's messages; for training the last is the assistant's.
        tools: must be empty.
        is_generate: all of the messages are context.
        enable_thinking: changes nothing.

    Raises:
        ConfigError: tools, or content other than text.
    """
    from ...training.examples import IGNORED_LABEL, encode_pair

    if tools:
        raise ConfigError(f"template {TEXT} has no tools; choose a template for chat models.")
    tokenizer = getattr(processor, "tokenizer", processor)
    *before, last = messages
    context = "".join(_text(m, tokenizer.eos_token) for m in (messages if is_generate else before))
    ids: list[int]
    answer: list[int] = []
    if is_generate:
        ids = tokenizer.encode(context)
    else:
        ids, answer = encode_pair(tokenizer, context, _text(last))
        answer.append(tokenizer.eos_token_id)
    return {
        "input_ids": ids + answer,
        "attention_mask": [1] * len(ids + answer),
        "labels": [IGNORED_LABEL] * len(ids) + answer,
        "loss_weights": [0.0] * len(ids) + [1.0] * len(answer),
    }


def parse_text(text: str) -> dict[str, Any]:
    """What the model said, as a message."""
    return {"role": "assistant", "content": [{"type": "text", "value": text}]}


def _text(message: Mapping[str, Any], eos: str = "") -> str:
    """A message's text, ended by `eos` if it is the assistant's."""
    kinds = {part["type"] for part in message["content"]}
    if kinds - {"text"}:
        raise ConfigError(
            f"template {TEXT} takes text only, and the data has {', '.join(sorted(kinds))}; choose "
            "a template for chat models."
        )
    end = eos if message["role"] == "assistant" else ""
    return "".join(part["value"] for part in message["content"]) + end


def _load_of_plain_lora(load: Callable[..., Any]) -> Any:
    """v1's loader for `name: lora`, which would train whatever it finds and compare nothing."""

    @functools.wraps(load)
    def load_plain(model: Any, adapter_name_or_path: Any, is_train: bool) -> Any:
        paths = adapter_name_or_path
        for path in paths if isinstance(paths, list) else [paths]:
            folder = Path(str(path))
            if not is_train or not (folder / CONFIG_FILE).is_file():
                continue  # v1 merges what it does not train, which our layers judge
            if read_adapter_config(folder).get("peft_type") == PEFT_TYPE:
                raise ConfigError(
                    f"{folder} is a mixture of LoRA experts; set peft_config's name to {ADAPTER} "
                    "to train it on."
                )
        return load(model, adapter_name_or_path, is_train)

    load_plain.moelora = True  # type: ignore[attr-defined]
    return load_plain


def _merge_that_explains(merge: Callable[..., Any], get_args: Callable[..., Any]) -> Any:
    """v1's `merge`; where it refuses our adapter, with our reason."""

    @functools.wraps(merge)
    def merge_or_explain(*args: Any, **keywords: Any) -> Any:
        try:
            return merge(*args, **keywords)
        except ValueError:
            model_args, *_ = get_args(*args, **keywords)
            if (model_args.peft_config or {}).get("name") != ADAPTER:
                raise
            raise ExportError(
                "LLaMA-Factory v1 merges plain LoRA only: the gates of a mixture follow the input, "
                "so no single weight equals it; serve it unmerged (chat), or write an "
                "approximation with `moelora export ADAPTER --to merged --strategy mean-gate --out "
                "DIR`."
            ) from None

    merge_or_explain.moelora = True  # type: ignore[attr-defined]
    return merge_or_explain


def _adapter_folder(path: Any) -> Path:
    """The folder of the one adapter to load.

    Raises:
        ConfigError: several adapters, or one of another kind.
    """
    # v1 makes a number of a path such as "2024".
    paths = [str(p) for p in (path if isinstance(path, list) else [path])]
    if len(paths) > 1:
        raise ConfigError(
            f"adapter_name_or_path names {len(paths)} adapters, and a routed adapter cannot be "
            "merged to make room for another; name one."
        )
    folder = resolve_adapter(paths[0])
    kind = read_adapter_config(folder).get("peft_type")
    if kind != PEFT_TYPE:
        raise ConfigError(
            f"The adapter in {folder} is of type {kind}; set peft_config's name to "
            f"{str(kind).lower()}."
        )
    verify_adapter(folder)
    return folder


def _value(key: str, value: Any) -> Any:
    """An option as MoeLoraConfig takes it.

    v1 makes numbers of strings of digits and leaves others, such as "1e-3", alone.
    """
    if key == "target_modules" and value == "all":  # v1's word
        return "all-linear"
    if key in _NAME_LISTS and isinstance(value, str) and value != "all-linear":
        return [name.strip() for name in value.split(",")]
    return _number(value) if key in _NUMBERS else value


def _number(value: Any) -> Any:
    """A string as a number where it is one."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


def _required_number(key: str, value: Any) -> float:
    number = _number(value)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ConfigError(f"optim_config: {key}={value!r} must be a number.")
    return number


def _betas(value: Any) -> tuple[float, float]:
    """[0.9, 0.999], or the same as a string."""
    given = value.strip("[]()").split(",") if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise ConfigError(f"optim_config: betas={value!r} must be two numbers, as [0.9, 0.999].")
    first, second = (_required_number("betas", beta) for beta in given)
    return first, second
