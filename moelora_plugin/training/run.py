"""Train an adapter from a recipe."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel, get_peft_model
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from moelora_eval_tasks.catalog import resolve

from .. import MoeLoraConfig
from ..checkpoint import CONFIG_FILE, extend_manifest, read_adapter_config, save_adapter
from ..clusters import ClusterAssigner
from ..errors import ConfigError, first_line
from ..files import json_text, write_text_in
from ..routers.scores.embedding import DEFAULT_NUM_IDS
from ..run_guards import refuse_other_config
from ..schema import require
from .arguments import training_arguments
from .base import load_model, load_processor
from .callbacks import RoutingLog, record_routing
from .data import Collator, TrainingData, collator_for, load_data, refuse_images
from .recipe import Recipe
from .result import RunFolder, TrainResult
from .trainer import MoeLoraTrainer

logger = logging.getLogger(__name__)

_RECORDED_PACKAGES = ("accelerate", "datasets", "peft", "torch", "transformers")


def train(
    recipe: Recipe,
    overwrite: bool = False,
    resume: str | Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainResult:
    """Train an adapter and save it into `recipe.output_dir`.

    Cheap checks come first: what can be known to be wrong fails before the base is loaded. A run
    that fails leaves nothing behind but the checkpoints it has finished.

    Args:
        recipe: what to train, on what, and how.
        overwrite: replace the run that `output_dir` holds.
        resume: continue from a checkpoint: its folder, or "last" for the last one in `output_dir`.
        callbacks: further callbacks for transformers' Trainer.

    Raises:
        ConfigError: the recipe cannot be carried out, or `output_dir` already holds something.
        DataError: the data is not what a task needs.
        MissingDependencyError: the base or the data is not here and the hub is out of reach.
    """
    folder = RunFolder(Path(recipe.output_dir))
    checkpoint = None if resume is None else folder.checkpoint(resume)
    folder.check(overwrite=overwrite, checkpoint=checkpoint)
    arguments = training_arguments(recipe, folder.checkpoints)
    config = adapter_config(recipe)
    if checkpoint is not None:
        _refuse_other_run(config, Path(checkpoint))
    tasks = resolve(recipe.data.tasks)
    _check_ids(config, "task", len(tasks), "data.tasks")
    if config.router_input == "cluster" and recipe.data.clusters is None:
        raise ConfigError(
            "adapter.router_input is 'cluster', so data.clusters must name a folder that "
            "`moelora cluster` has made."
        )
    if recipe.data.clusters is not None:
        refuse_images(tasks, "no cluster knows; remove data.clusters")

    processor = load_processor(recipe.model)
    evaluates = arguments.eval_strategy != "no"
    data = load_data(recipe.data, processor, seed=recipe.seed, validation=evaluates)
    if data.cut_rows:
        logger.warning(
            "%d prompts were longer than data.max_length=%d and lost their beginning.",
            data.cut_rows,
            recipe.data.max_length,
        )
    base = load_model(recipe.model, str(arguments.device))
    if recipe.data.clusters is not None:
        clusters = ClusterAssigner.load(recipe.data.clusters, base)
        _check_ids(config, "cluster", len(clusters.sizes), "data.clusters")
        data = data.with_clusters(clusters, arguments.per_device_eval_batch_size)
    set_seed(recipe.seed)  # the adapter's initialisation must not depend on what came before
    model = get_peft_model(base, config)
    trainable_parameters, _ = model.get_nb_trainable_parameters()
    collator = collator_for(processor)

    earlier = None
    try:
        if checkpoint is None and arguments.should_save:
            earlier = folder.begin()
        trainer = _trainer(recipe, model, processor, data, collator, arguments, callbacks)
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
        if not math.isfinite(outcome.training_loss):
            raise FloatingPointError(f"The loss became {outcome.training_loss}.")
    except FloatingPointError as error:  # the optimizer raises it when a metric is not finite
        raise ConfigError(
            f"Training diverged ({first_line(error)}); lower optimizer.lr "
            f"({recipe.optimizer.lr:g}), raise optimizer.damping ({recipe.optimizer.damping:g}) or "
            "choose a wider model.dtype."
        ) from error
    finally:
        if arguments.should_save:
            folder.restore(earlier)
    result = TrainResult(
        output_dir=folder.path,
        adapter_dir=folder.adapter,
        steps=outcome.global_step,
        train_loss=outcome.training_loss,
        eval_loss=None,
        seconds=outcome.metrics["train_runtime"],
        trainable_parameters=trainable_parameters,
        rows=len(data.train),
        cut_rows=data.cut_rows,
        log_history=trainer.state.log_history,
    )
    # First what cannot be had again: whatever is measured on it may fail.
    if arguments.should_save:
        save_adapter(
            model,
            folder.adapter,
            tokenizer=processor,
            manifest=_manifest(recipe, data, processor, result),
            overwrite=overwrite or checkpoint is not None,
        )
        settings = yaml.safe_dump(recipe.to_dict(), sort_keys=False)
        write_text_in(folder.path, folder.recipe.name, settings)
    measured: dict[str, Any] = {}
    if evaluates:
        measured |= _measured("eval_loss", lambda: trainer.evaluate()["eval_loss"])
    if arguments.should_save:
        measured |= _measured(
            "routing",
            lambda: record_routing(
                model,
                data.validation or data.train,
                collator,
                batch_size=arguments.per_device_eval_batch_size,
            ),
        )
        write_text_in(folder.path, folder.log_history.name, json_text(result.log_history))
        extend_manifest(folder.adapter, measured)
        folder.finish()
    return replace(result, eval_loss=measured.get("eval_loss"))


def _measured(name: str, measure: Callable[[], Any]) -> dict[str, Any]:
    """One entry of the manifest, or none, with a warning, where the trained model fails at it."""
    try:
        return {name: measure()}
    except Exception as error:  # out of memory, a metric that is not finite, ...: all is saved
        logger.warning(
            "The adapter is trained and saved, but %s could not be measured (%s).",
            name,
            first_line(error),
        )
        return {}


def adapter_config(recipe: Recipe) -> MoeLoraConfig:
    """The recipe's `adapter` as a validated config."""
    fields = {"task_type": "CAUSAL_LM", **recipe.adapter}
    preset = fields.pop("preset", "moe_lora")
    require(isinstance(preset, str), "adapter.preset", preset, "the name of a preset")
    return MoeLoraConfig.from_preset(preset, **fields)


def _refuse_other_run(config: MoeLoraConfig, checkpoint: Path) -> None:
    """What the Trainer's guard refuses, before the base is loaded."""
    if (checkpoint / CONFIG_FILE).is_file():  # some engines save shards alone
        saved = read_adapter_config(checkpoint)
        refuse_other_config(config, saved, checkpoint, key_of=lambda field: f"adapter.{field}")


def _check_ids(config: MoeLoraConfig, router_input: str, number: int, source: str) -> None:
    """Refuse an adapter that has fewer ids than the data; an accelerator would not say why."""
    if (config.router_input, config.router_score) != (router_input, "embedding"):
        return
    num_ids = config.router_score_kwargs.get("num_ids", DEFAULT_NUM_IDS)
    if isinstance(num_ids, int) and num_ids < number:
        raise ConfigError(
            f"{source} has {number} ids and the adapter {num_ids}; raise "
            "adapter.router_score_kwargs.num_ids."
        )


def _trainer(
    recipe: Recipe,
    model: PeftModel,
    processor: Any,
    data: TrainingData,
    collator: Collator,
    arguments: TrainingArguments,
    callbacks: Sequence[TrainerCallback],
) -> MoeLoraTrainer:
    """The trainer with its optimizer's options, its data and its callbacks."""
    own: list[TrainerCallback] = []
    if data.validation is not None:
        own.append(RoutingLog(data.validation, collator))
    if recipe.early_stopping is not None:
        patience, threshold = recipe.early_stopping.patience, recipe.early_stopping.threshold
        own.append(EarlyStoppingCallback(patience, threshold))
    return MoeLoraTrainer(
        optimizer_arguments=recipe.optimizer.build_arguments(),
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=collator,
        processing_class=processor,
        callbacks=[*own, *callbacks],
    )


def _manifest(
    recipe: Recipe,
    data: TrainingData,
    processor: Any,
    result: TrainResult,
) -> dict[str, Any]:
    """How the adapter came about, for whoever gets it."""
    settings = recipe.to_dict()
    # Where things lay on this machine is no part of the method, and the adapter will be shared.
    del settings["output_dir"], settings["data"]["data_dir"], settings["data"]["clusters"]
    images = getattr(processor, "image_processor", None)
    return {
        "recipe": settings,
        "data": data.to_dict(),
        "image_processor": None if images is None else images.to_dict(),
        "steps": result.steps,
        "train_loss": result.train_loss,
        "eval_loss": None,  # measured when the adapter is saved
        "trainable_parameters": result.trainable_parameters,
        "seconds": result.seconds,
        "packages": {name: version(name) for name in _RECORDED_PACKAGES},
    }
