"""Folding a routed adapter into its base: exactly where that is possible, approximately on request.

Shape suffixes: T tokens, I in, O out, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from moelora_eval_tasks.catalog import resolve
from moelora_eval_tasks.loading import load_split
from moelora_eval_tasks.prompts import render

from ..analysis import RoutingStatistics, routing_statistics
from ..errors import ConfigError, ExportError
from ..layers import MoeLoraLinear, RoutedLayer, refuse_tied
from ..model import moelora_layers, routed_layers

STRATEGIES = ("exact", "mean-gate")

# Mean gates settle quickly: a few thousand tokens move them in the third digit.
CALIBRATION_ROWS = 64
CALIBRATION_TOKENS = 512


@dataclass(frozen=True)
class Merge:
    """How a merge went.

    Attributes:
        strategy: what was asked for.
        layer_errors: per layer, |static(x) - routed(x)| / |routed(x)| of the update over the
            calibration tokens (Frobenius norms); empty where the merge is exact.
        logit_error: the same of the final logits.
    """

    strategy: str
    layer_errors: dict[str, float] = field(default_factory=dict)
    logit_error: float = 0.0


def merge_exact(model: PeftModel) -> Merge:
    """Fold every layer, in place.

    Raises:
        ExportError: the gates follow the input.
    """
    model.merge_adapter(safe_merge=True)
    return Merge("exact")


def merge_mean_gate(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> Merge:
    """Give every expert its mean gate over `texts` and fold, in place.

    The gates of a layer that ignores its input are their own mean, so such an adapter merges
    exactly.

    Raises:
        ExportError: gates are NaN or infinite, or the experts do not fold into weights whatever the
            gates are.
    """
    _refuse_unfoldable(model)
    batches = [
        tokenizer(text, return_tensors="pt", truncation=True, max_length=CALIBRATION_TOKENS)
        for text in texts
    ]
    with routing_statistics(model) as statistics:
        routed_logits = [_logits(model, batch) for batch in _progress(batches, "mean gates")]
    layers = moelora_layers(model)
    gates = _mean_gates(model, statistics)
    updates = {name: layer.static_update(weights_E=gates[name]) for name, layer in layers.items()}
    layer_errors = _layer_errors(model, layers, updates, batches)
    for name, layer in layers.items():
        layer.fold(updates[name])
        layer.merged_adapters.append("default")  # from here on the folded weight answers alone
    difference = reference = 0.0
    for batch, routed in zip(_progress(batches, "logit error"), routed_logits, strict=True):
        static = _logits(model, batch)
        difference += float((static - routed).square().sum())
        reference += float(routed.square().sum())
    return Merge("mean-gate", layer_errors, (difference / max(reference, 1e-30)) ** 0.5)


def calibration_texts(tasks: Sequence[str], data_dir: str | None) -> list[str]:
    """Training prompts with their answers, the same number from each task.

    Raises:
        ConfigError: no task is known.
    """
    if not tasks:
        raise ConfigError(
            "mean-gate averages the gates over text, and this adapter does not say what it was "
            "trained on; pass --calibration-tasks, for example sst2."
        )
    resolved = resolve(tasks)
    rows = max(1, CALIBRATION_ROWS // len(resolved))
    texts = []
    for task in resolved:
        for doc in load_split(task, "train", data_dir=data_dir, limit=rows):
            prompt = render(task, doc)
            texts.append(prompt.context + prompt.choices[prompt.gold])
    return texts


def _refuse_unfoldable(model: PeftModel) -> None:
    """Ask every layer with some gates, before minutes are spent on finding the right ones."""

    def uniform(layer: RoutedLayer) -> Tensor:
        experts = layer.experts_decided_about("default")
        return torch.full((experts,), 1 / experts)

    layers = moelora_layers(model)
    for layer in layers.values():
        layer.refuse_merge("default", layer.mean_weights(uniform))
    refuse_tied(model, layers)


def _mean_gates(model: PeftModel, statistics: RoutingStatistics) -> dict[str, Tensor]:
    """The mean gates (E,) of every linear, its own router's or those of the router it follows."""
    names = {id(layer): name for name, layer in routed_layers(model).items()}

    def mean_of(layer: RoutedLayer) -> Tensor:
        name = names[id(layer)]
        counts = statistics.layers.get(name)
        if counts is None or counts.not_finite or not counts.tokens:
            raise ExportError(
                f"The gates of {name} are not finite numbers on all of the calibration text, so "
                "they have no mean; the adapter seems broken."
            )
        return torch.tensor(counts.summary()["weight"])

    return {name: layer.mean_weights(mean_of) for name, layer in moelora_layers(model).items()}


@torch.inference_mode()
def _layer_errors(
    model: PeftModel,
    layers: dict[str, MoeLoraLinear],
    updates: dict[str, Tensor],
    batches: Sequence[Any],
) -> dict[str, float]:
    """Relative error of each layer's update over the calibration tokens, on the routed inputs."""
    sums = {name: [0.0, 0.0] for name in layers}

    def compare(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(layer, MoeLoraLinear)
            routed = layer.update(args[0])
            static = layer.apply_update(args[0], updates[name])
            sums[name][0] += float((static - routed).square().sum())
            sums[name][1] += float(routed.square().sum())

        return hook

    handles = [layer.register_forward_hook(compare(name)) for name, layer in layers.items()]
    try:
        for batch in _progress(batches, "layer errors"):
            _logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    # An update that is zero everywhere is matched exactly by the folded zero.
    return {name: (d / r) ** 0.5 if r else 0.0 for name, (d, r) in sums.items()}


@torch.inference_mode()
def _logits(model: PeftModel, batch: Any) -> Tensor:
    """Logits at the last position, where answers are read."""
    logits: Tensor = model(**batch.to(model.device)).logits[:, -1]
    return logits


def _progress(batches: Sequence[Any], what: str) -> Any:
    return tqdm(batches, desc=f"calibrating: {what}")
