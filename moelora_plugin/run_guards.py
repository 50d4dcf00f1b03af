"""What a run with a MoE-LoRA adapter holds to, whichever program trains it.

Something of the adapter trains, it moves, what is saved holds all of it, and a run that is resumed
asks for the adapter that it goes on with. Programs call these functions through a callback of
transformers' Trainer or of their own.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.peft_model import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .config import PEFT_TYPE, MoeLoraConfig
from .errors import AdapterError, ConfigError, first_line
from .model import routed_layers
from .reading import read_json

logger = logging.getLogger(__name__)

_ANEW = "start anew without resuming"
# What may differ between a run and the checkpoint that it goes on from: folders move, and the rest
# says nothing about the forward or the gradient.
_MAY_DIFFER = {
    "auto_mapping",
    "base_model_name_or_path",
    "gate_rescale_used",  # stands under gate_rescale in what is compared
    "inference_mode",
    "peft_type",  # compared before
    "peft_version",
    "revision",
    "task_type",
}
# What a program may leave in place of PEFT's file: an engine's shards, or a whole model's weights.
_OTHER_WEIGHTS = (
    "adapter_model.bin",
    "*model*.safetensors",
    "pytorch_model*",
    "global_step*",
    "*.distcp",
)
_NAMES_SHOWN = 3
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Movement:
    """Whether an adapter's tensors train.

    A tensor's digest is the sum of its bits: it need only tell a tensor from itself a few updates
    ago, without a copy. Of a sharded tensor this process's part counts, which holds a part of
    nearly every expert.

    Args:
        model: what is about to train, prepared by the program's engine.

    Raises:
        ConfigError: nothing of the adapter trains.
    """

    def __init__(self, model: nn.Module) -> None:
        refuse_nested(model)
        self._layers = {
            name: [p for p in layer.trainable_parameters() if p.numel()]
            for name, layer in routed_layers(model).items()
        }
        self._tensors = {id(p): p for parameters in self._layers.values() for p in parameters}
        self._is_visible = not _is_flattened(model)
        if self._is_visible and not self._tensors:
            _refuse_frozen(model)
        self._before = {key: _digest(tensor) for key, tensor in self._tensors.items()}
        self._moved = not self._before
        self._got_gradients = False
        self._updates = 0

    @property
    def parameters(self) -> Iterable[Tensor]:
        """The adapter's tensors that train."""
        return self._tensors.values()

    def before_update(self) -> None:
        """Look at the gradients, until something has moved."""
        if not self._moved:
            self._got_gradients |= any(p.grad is not None for p in self.parameters)

    def after_update(self, gradients_seen: bool) -> None:
        """Count an update that was taken with a learning rate above 0.

        Args:
            gradients_seen: whether `before_update` would have met gradients, which some engines
                keep to themselves.

        Raises:
            ConfigError: the adapter got no gradient at all, and did not move.
        """
        self._updates += 1
        if self._moved:
            return
        self._moved = any(self._has_moved(key) for key in self._tensors)
        if not self._moved and gradients_seen and not self._got_gradients:
            raise ConfigError(
                f"No gradient reached any of the adapter's {len(self._tensors)} trainable tensors, "
                "so that nothing would be learned: the model that computes the loss does not use "
                "them (another adapter is active, or adapters are disabled); call "
                "`model.set_adapter(name)` with the adapter that is to train."
            )

    def end(self) -> None:
        """Judge the run, and name the modules where nothing has moved.

        Raises:
            ConfigError: updates were taken, and nothing has moved.
        """
        if not self._updates or not self._is_visible:
            return
        if not self._moved:
            dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in self.parameters})
            raise ConfigError(
                f"Nothing was learned: {self._updates} updates with a learning rate above 0 left "
                f"all {len(self._tensors)} trainable tensors of the adapter as they were; either "
                "their gradients were zero (no label counts, or all rewards of a group are equal), "
                f"or learning_rate is too small for {' and '.join(dtypes)}."
            )
        still = [
            name
            for name, parameters in self._layers.items()
            if parameters and not any(self._has_moved(id(p)) for p in parameters)
        ]
        if still and self._updates > 1:
            logger.warning(
                "%d of %d adapted modules did not move in %d updates, so they have learned "
                "nothing (the model does not call them, or their gradients are zero): %s.",
                len(still),
                len(self._layers),
                self._updates,
                _listed(still),
            )

    def _has_moved(self, key: int) -> bool:
        return bool(_digest(self._tensors[key]) != self._before[key])


def refuse_nested(model: nn.Module) -> None:
    """A PeftModel inside another: the inner one's adapter is frozen and not saved.

    Raises:
        ConfigError: there is one.
    """
    for name, module in model.named_modules():
        if not isinstance(module, PeftModel):
            continue
        inner = [n for n, m in module.named_modules() if n and isinstance(m, PeftModel)]
        if inner:
            raise ConfigError(
                f"The model holds a PeftModel inside another ({name or 'itself'}, {inner[0]}), "
                "whose adapter would neither train nor be saved; put the second adapter beside the "
                "first with `model.load_adapter(folder, name)` or `model.add_adapter(name, "
                "config)`."
            )


def check_saved(model: nn.Module, folder: Path) -> None:
    """A checkpoint must hold every tensor of the adapter that trains. Reads its header only.

    Args:
        model: what trains.
        folder: where the program has just saved it. One that holds an engine's own shards in place
            of PEFT's file passes, and is given the adapter's configuration if it has none, so that
            a run which goes on from it can be compared.

    Raises:
        AdapterError: a tensor is not there, or has another shape.
    """
    if _is_flattened(model):
        return
    for adapter, wanted in _adapters_that_train(model):
        # PEFT gives an adapter that is not called "default" a folder of its own.
        places = [p for p in (folder / adapter, folder) if (p / CONFIG_NAME).is_file()]
        file = (places[0] if places else folder) / SAFETENSORS_WEIGHTS_NAME
        if not file.is_file():
            if any(True for pattern in _OTHER_WEIGHTS for _ in file.parent.glob(pattern)):
                if not places:
                    _peft_configs(model)[adapter].save_pretrained(str(folder))
                continue
            raise AdapterError(
                f"{file} is not there, so that what is learned would be lost; this program saves "
                "another model than it trains."
            )
        stored = _shapes(file)
        missing = [n for n, tensor in wanted.items() if stored.get(n) != tuple(tensor.shape)]
        if missing:
            raise AdapterError(
                f"{file} lacks {len(missing)} of the {len(wanted)} tensors of the adapter that "
                f"trains ({_listed(missing)}), so that what is learned would be lost; this program "
                "saves another model than it trains."
            )


def refuse_other_run(model: nn.Module, folder: Path, *, optimizer_is_built: bool = False) -> None:
    """A run that goes on from a checkpoint must ask for the adapter that the checkpoint holds.

    Programs load the tensors alone, so that another `top_k` or alpha would go on without a word.

    Args:
        model: what goes on.
        folder: the checkpoint's.
        optimizer_is_built: the gates' exponent is then known, and must be the checkpoint's too.

    Raises:
        ConfigError: the configurations differ, or the tensors' names.
    """
    for adapter, wanted in _adapters_that_train(model):
        places = [p for p in (folder / adapter, folder) if (p / CONFIG_NAME).is_file()]
        if not places:  # an engine's own shards; nothing says how the adapter was made
            continue
        config: MoeLoraConfig = _peft_configs(model)[adapter]
        saved = read_json(places[0] / CONFIG_NAME, remedy=_ANEW)
        refuse_other_config(config, saved, folder, optimizer_is_built=optimizer_is_built)
        file = places[0] / SAFETENSORS_WEIGHTS_NAME
        stored = _shapes(file) if file.is_file() else wanted
        differing = sorted(n for n in set(wanted) ^ set(stored) if ".moelora_" in n)
        if differing:
            raise ConfigError(
                f"target_modules of this run names other modules than the checkpoint in {folder} "
                f"was trained with: {len(differing)} tensors are in one of the two only "
                f"({_listed(differing)}); set it back, or start anew without resuming."
            )


def refuse_other_config(
    config: MoeLoraConfig,
    saved: Mapping[str, Any],
    folder: Path,
    *,
    optimizer_is_built: bool = False,
    key_of: Callable[[str], str] = str,
) -> None:
    """The same of two configurations.

    Args:
        config: this run's.
        saved: the checkpoint's, as it stands in its file.
        folder: the checkpoint's, for the error.
        optimizer_is_built: as in `refuse_other_run`.
        key_of: the program's key for a field of MoeLoraConfig, for the error.

    Raises:
        ConfigError: they differ.
    """
    if saved.get("peft_type") != PEFT_TYPE:
        raise ConfigError(
            f"The checkpoint in {folder} holds an adapter of type {saved.get('peft_type')} and "
            f"this run trains one of type {PEFT_TYPE}; {_ANEW}."
        )
    names = [field.name for field in dataclasses.fields(MoeLoraConfig) if field.init]
    for name, wanted, found in differences(
        config, saved, [name for name in names if name not in _MAY_DIFFER]
    ):
        if name == "gate_rescale":
            modes = {"none" if mode == "auto" else mode for mode in (wanted, found)}
            if not optimizer_is_built or len(modes) == 1:
                continue
        if name == "target_modules" and not (isinstance(wanted, list) and isinstance(found, list)):
            continue  # a pattern and what it has found; the tensors' names tell
        raise ConfigError(
            f"{key_of(name)} is {wanted!r} in this run, and the checkpoint in {folder} was "
            f"trained with {found!r}; set it back, or start anew without resuming"
            f"{' (the optimizer decides it)' if name == 'gate_rescale' else ''}."
        )


def differences(
    config: MoeLoraConfig, saved: Mapping[str, Any], names: Iterable[str]
) -> Iterable[tuple[str, Any, Any]]:
    """Where a configuration differs from a saved one: a field, its value, and the saved value.

    Args:
        config: a run's.
        saved: as it stands in a file; a key that is missing stands for its default.
        names: the fields to compare.
    """
    defaults = MoeLoraConfig().to_dict()
    ours: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=list))
    for name in names:
        wanted, found = ours[name], saved.get(name, defaults[name])
        if _comparable(wanted) != _comparable(found):
            yield name, wanted, found


def _comparable(value: Any) -> Any:
    """Names in any order; an empty list and none are one."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return sorted(value) or None
    return value


def _refuse_frozen(model: nn.Module) -> None:
    if any(parameter.requires_grad for parameter in model.parameters()):
        logger.warning(
            "All tensors of the MoE-LoRA adapter are frozen, and other parameters of the model "
            "train; load it with is_trainable=True if it is to train."
        )
        return
    raise ConfigError(
        "All tensors of the MoE-LoRA adapter are frozen, so that nothing would train; load it with "
        "is_trainable=True, and call `model.set_adapter(name)` if another adapter is active."
    )


def _is_flattened(model: nn.Module) -> bool:
    """Whether an engine keeps the tensors where no name finds them (FSDP version 1, ZeRO 3)."""
    return any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()) or any(
        hasattr(p, "ds_id") for p in model.parameters()
    )


def _digest(tensor: Tensor) -> Tensor:
    local: Any = tensor.detach()
    local = local.to_local() if hasattr(local, "to_local") else local
    bits = local.contiguous().view(_INTEGERS[local.element_size()])
    digest: Tensor = bits.sum(dtype=torch.int64).cpu()
    return digest


def _peft_configs(model: nn.Module) -> Mapping[str, Any]:
    """By adapter: of the PeftModel inside, or of a transformers model with adapters of its own."""
    holder: Any = _holder(model)
    return {} if holder is None else holder.peft_config


def _holder(model: nn.Module) -> nn.Module | None:
    """What holds the adapters, however it is wrapped."""
    modules = list(model.modules())
    peft_model = next((m for m in modules if isinstance(m, PeftModel)), None)
    return peft_model or next((m for m in modules if hasattr(m, "peft_config")), None)


def _adapters_that_train(model: nn.Module) -> Iterable[tuple[str, dict[str, Tensor]]]:
    """Our adapters of which something trains, with their tensors as PEFT's file names them."""
    holder: Any = _holder(model)
    for adapter, config in _peft_configs(model).items():
        trains = any(
            adapter in layer.active_adapters and layer.trainable_parameters()
            for layer in routed_layers(model).values()
        )
        if not isinstance(config, MoeLoraConfig) or not trains:
            continue
        state = get_peft_model_state_dict(holder, adapter_name=adapter, save_embedding_layers=False)
        # transformers saves the adapters of its own models under PEFT's names.
        prefix = "" if isinstance(holder, PeftModel) else "base_model.model."
        yield adapter, {f"{prefix}{name}": tensor for name, tensor in state.items()}


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as content:
            names = list(content.keys())
            return {name: tuple(content.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise AdapterError(f"{file} is truncated or damaged ({first_line(error)}).") from error


def _listed(names: list[str]) -> str:
    rest = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
