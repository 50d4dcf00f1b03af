"""Which task is which, for adapters that route by the task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moelora_eval_tasks.catalog import Task, resolve

from ..checkpoint import read_manifest, resolve_adapter
from ..config import MoeLoraConfig
from ..errors import ConfigError
from ..manifest import training_of


def trained_task_ids(model: Any, adapter: str, tasks: Iterable[Task]) -> dict[str, int]:
    """The id that each task was trained with; nothing where the adapter does not route by it.

    Args:
        model: the model with the adapter.
        adapter: the adapter's folder or hub id; its manifest holds the recipe's tasks.
        tasks: what is to be scored.

    Raises:
        ConfigError: a task that the adapter was not trained on, and no default id.
    """
    configs = [config for config in model.peft_config.values() if isinstance(config, MoeLoraConfig)]
    by_task = [config for config in configs if config.router_input == "task"]
    recipe = training_of(read_manifest(resolve_adapter(adapter))).recipe
    if not by_task or recipe is None:
        return {}
    trained = [task.name for task in resolve(recipe.data.tasks)]
    names = [task.name for task in tasks]
    strange = [name for name in names if name not in trained]
    if strange and any(config.router_input_kwargs.get("default") is None for config in by_task):
        raise ConfigError(
            f"The adapter routes by task and was not trained on {strange[0]}; evaluate "
            f"{', '.join(trained)}, or set router_input_kwargs={{'default': ID}} in its "
            "adapter_config.json."
        )
    return {name: trained.index(name) for name in names if name in trained}
