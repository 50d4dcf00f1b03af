"""swift's interface to an adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from swift.tuner_plugin.base import PeftTuner
from swift.utils import get_logger
from torch import nn

from ...errors import ConfigError
from ...targets import ALL_LINEAR, asks_for_all_linear
from ..options import verify_adapter
from .arguments import (
    TUNER_TYPE,
    moelora_config,
    refuse_mixture,
    refuse_other_config,
    refuse_other_type,
    states_targets,
    targets_are_the_presets,
)

# As swift's own LoRA has them; what is not here ("embedding") has no PEFT task.
_TASK_TYPES = {
    "causal_lm": "CAUSAL_LM",
    "decision": "CAUSAL_LM",
    "generative_reranker": "CAUSAL_LM",
    "reranker": "SEQ_CLS",
    "seq_cls": "SEQ_CLS",
}


class MoeLoraTuner(PeftTuner):  # type: ignore[misc]
    """A mixture of LoRA experts; loading is PEFT's own."""

    @staticmethod
    def prepare_model(args: Any, model: nn.Module) -> PeftModel:
        """The model with a new adapter.

        Raises:
            ConfigError: an argument is wrong or does not go with this adapter.
        """
        from swift.pipelines.train.tuner import get_modules_to_save

        is_the_presets = targets_are_the_presets(args)
        config = moelora_config(
            args,
            target_modules=None if is_the_presets else _targets(args, model),
            modules_to_save=get_modules_to_save(args, model, args.task_type) or None,
        )
        # Where swift has made an expression of "all-linear", nobody named what it matches.
        if asks_for_all_linear(args.target_modules):
            config.targets_by_default = True
        config.task_type = _TASK_TYPES.get(args.task_type)
        get_logger().info(f"moelora_config: {config}")
        return get_peft_model(model, config)

    @staticmethod
    def from_pretrained(
        model: nn.Module, model_id: str, adapter_name: str = "default", **kwargs: Any
    ) -> PeftModel:
        """The model with a saved adapter, beside those that it has (`ref_adapters`).

        Raises:
            ConfigError: it is an adapter of another type, or its name is taken.
            AdapterError: it was changed since it was saved.
        """
        if refuse_other_type(model_id):
            verify_adapter(Path(model_id))
        if not isinstance(model, PeftModel):
            loaded: PeftModel = PeftTuner.from_pretrained(
                model, model_id, adapter_name=adapter_name, **kwargs
            )
            return loaded
        if adapter_name in model.peft_config:
            raise ConfigError(
                f"adapters names a second adapter, {model_id}, and one answers at a time; name one "
                "alone, or with `swift deploy` give each a name (--adapters a=FOLDER b=FOLDER)."
            )
        model.load_adapter(model_id, adapter_name, **kwargs)
        return model

    @staticmethod
    def save_pretrained(
        model: Any, save_directory: str, state_dict: Any = None, **kwargs: Any
    ) -> None:
        """Save what trains, from the gathered tensors where swift gathers them."""
        if isinstance(model, PeftModel):
            kwargs.setdefault("selected_adapters", ["default"])
        model.save_pretrained(save_directory, state_dict=state_dict, **kwargs)


def refuse_other_adapter(args: Any, model: Any) -> None:
    """A run on a saved adapter must ask for that adapter; swift compares nothing.

    Args:
        args: swift's training arguments.
        model: the base.

    Raises:
        ConfigError: the adapter is of another type, or was trained with other values.
    """
    from swift.pipelines.train.tuner import get_modules_to_save

    if args.tuner_type != TUNER_TYPE:
        refuse_mixture(args)
        return
    folder = args.resume_from_checkpoint or next(iter(args.adapters), None)
    if folder is None:
        return
    stated: dict[str, Any] = {}
    if states_targets(args) and not targets_are_the_presets(args):
        stated["target_modules"] = _targets(args, model)
    if args.modules_to_save:
        stated["modules_to_save"] = get_modules_to_save(args, model, args.task_type)
    refuse_other_config(args, folder, model, **stated)


def _targets(args: Any, model: Any) -> Any:
    """What swift makes of `target_modules`, but for "all-linear", which stays a word.

    swift's names for it are of linears here and of fused experts there, or of what cannot learn. Of
    a multimodal model swift takes the parts that train, by an expression.
    """
    from swift.pipelines.train.tuner import get_target_modules

    named = args.target_modules
    if not asks_for_all_linear(named) or model.model_meta.is_multimodal:
        return get_target_modules(args, model)
    others = copy.copy(args)
    others.target_modules = [] if isinstance(named, str) else [n for n in named if n != ALL_LINEAR]
    listed = get_target_modules(others, model)
    return [ALL_LINEAR, *listed] if listed else ALL_LINEAR
