"""GuiLoMo: learn from the data how many experts, of which rank, each module gets.

The first stage of arXiv 2506.14646; the second is ordinary training with the allocation "modules".

Shape suffixes: E experts (the most that a module may get), N rows, R total rank, L lengths that a
selection chooses from, X any.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import MoeLoraConfig
from ..errors import ConfigError
from ..experts import LoraExperts, Tensors
from ..layers import MoeLoraLinear
from ..model import MoeLoraModel, moelora_layers
from ..routers import Router
from ..types import LayerPlan, Rows

LEAST_EXPERTS = 2
# What a rank or an expert that is not selected is multiplied by, as in the paper's code: enough to
# take it out, and not 0, so that Adam still trains it and it can be judged.
_REST = 1e-4
_ADAPTER = "default"


def selection_mask(selection_XL: Tensor, least: int = 1) -> Tensor:
    """1 for the first n entries of each row, almost 0 for the others, n = argmax + 1.

    The gradient is that of the soft mask sum_(n > l) softmax(selection)_n, the probability that
    entry l is among the first n: a straight-through estimate.

    Args:
        selection_XL: selections over the lengths 1 ... L.
        least: n is at least this.
    """
    soft_XL = torch.softmax(selection_XL, -1).flip(-1).cumsum(-1).flip(-1)
    count_X1 = _count(selection_XL, least).unsqueeze(-1)
    is_kept_XL = torch.arange(selection_XL.shape[-1], device=count_X1.device) < count_X1
    hard_XL = torch.where(is_kept_XL, 1.0, _REST).to(soft_XL)
    return hard_XL + soft_XL - soft_XL.detach()


def _count(selection_XL: Tensor, least: int = 1) -> Tensor:
    return (selection_XL.argmax(-1) + 1).clamp(min=least)


def _noise(*shape: int) -> Tensor:
    """Where selections start: a softmax of noise."""
    return torch.softmax(torch.randn(shape), -1)


class SearchRouter(Router):
    """A softmax over the experts that the module's selection keeps."""

    def __init__(self, in_features: int, plan: LayerPlan) -> None:
        super().__init__(in_features, plan)
        self.selection = nn.Parameter(_noise(plan.num_experts))

    def probabilities(self, scores_NE: Tensor, rows: Rows) -> Tensor:
        """The softmax times the mask, divided by the sum."""
        mask_E = selection_mask(self.selection, LEAST_EXPERTS)
        probs_NE = torch.softmax(scores_NE, -1, dtype=torch.float32) * mask_E
        return probs_NE / probs_NE.sum(-1, keepdim=True)

    def select(
        self, probs_NE: Tensor, preference_NE: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor | None]:
        """All of them."""
        return probs_NE, None


class SearchExperts(LoraExperts):
    """LoRA experts with a diagonal between B and A: the mask of each expert's selected ranks."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A, B and one selection per expert."""
        return {**super().shapes(), "selection": (self.plan.num_experts, self.uniform_rank())}

    def reset(self, tensors: Tensors) -> None:
        """Draw the selections."""
        super().reset(tensors)
        tensors["selection"].copy_(_noise(*tensors["selection"].shape))

    def _projecting(self, tensors: Tensors, training: bool) -> Tensor:
        """Diag(mask) A: the mixture becomes that of B_i diag(mask_i) A_i x."""
        return tensors["A"] * selection_mask(tensors["selection"]).reshape(-1, 1)

    def by_groups(self, tokens: int, selected: float, device_type: str) -> bool:
        """Never: the grouped path knows no mask."""
        return False


@dataclass(frozen=True)
class GuiLoMoResult:
    """What the search found.

    Attributes:
        modules: entries by module name, for the allocation "modules".
        train_losses: the loss of each step's training batch.
        validation_losses: the loss of each step's validation batch.
    """

    modules: dict[str, dict[str, Any]]
    train_losses: list[float]
    validation_losses: list[float]


def search_guilomo(
    model: PreTrainedModel,
    config: MoeLoraConfig,
    train: Iterable[Mapping[str, Any]],
    validation: Iterable[Mapping[str, Any]],
    *,
    steps: int,
    lr: float = 3e-4,
    selection_lr: float = 1e-2,
) -> GuiLoMoResult:
    """Learn selections by bilevel optimisation and read the allocation off them.

    Every module starts with `config.num_experts` experts of rank `config.r`. Each expert has a
    selection over its ranks 1 ... r, and the module one over its numbers of experts 1 ... E; the
    largest entry decides. In turn, a step trains experts and routers on a training batch with the
    selections held, and a step trains the selections on a validation batch with the rest held:

        min over selections of L_val(weights*(selections), selections)
        weights*(selections) = argmin over weights of L_train(weights, selections)

    Simplified against the paper's code (github.com/Liar406/Gui-LoMo):

    - the inner problem gets one step at a time, and how its weights depend on the selections is
      neglected (first order, as in DARTS);
    - a selection's gradient is a straight-through estimate with a soft mask; theirs sums the mask's
      gradients, weighted by the sigmoid of the selection, at the largest entry;
    - the kept experts are mixed by a softmax, theirs by top-k: an expert that is not selected for a
      token gives no gradient that could say whether it is worth keeping;
    - the diagonal E between B and A is the mask alone; theirs also trains a factor per rank, which
      A and B can express.

    Args:
        model: the base; it is adapted during the search and given back as it was.
        config: the adapter that is to be trained later. Its r and num_experts are the most that an
            expert and a module may get; its router, expert kind, initialisation (A and B from
            N(0, 0.02^2), as in the paper's code), allocation and losses are others in the search.
        train: training batches, keyword arguments of the model with labels; begun anew when they
            run out.
        validation: validation batches, likewise.
        steps: steps of the weights, and as many of the selections.
        lr: of experts and routers (AdamW).
        selection_lr: of the selections (Adam).

    Raises:
        ConfigError: fewer than two experts, a router that is not each module's own, a number out of
            range, no batches, or the search diverged.
    """
    if config.num_experts < LEAST_EXPERTS:
        raise ConfigError(
            f"num_experts={config.num_experts} must be at least {LEAST_EXPERTS}: it is the most "
            "that the search may give a module."
        )
    if config.site != "linear":
        raise ConfigError(
            f"site={config.site!r} shares routers between modules, which the search gives numbers "
            "of their own; set site to 'linear'."
        )
    for key, value in {"steps": steps, "lr": lr, "selection_lr": selection_lr}.items():
        if not value > 0:
            raise ConfigError(f"{key}={value!r} must be a number above 0.")

    was_training = model.training
    required_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    adapted = get_peft_model(model, _search_config(config), adapter_name=_ADAPTER)
    try:
        adapted.train()
        losses = _optimise(cast(PeftModel, adapted), train, validation, steps, lr, selection_lr)
        modules = {
            name: _entry(layer, config.top_k) for name, layer in moelora_layers(model).items()
        }
    finally:
        cast(MoeLoraModel, adapted.base_model).unload()
        model.train(was_training)
        for parameter, flag in required_grad:
            parameter.requires_grad_(flag)
    return GuiLoMoResult(modules, *losses)


def _search_config(config: MoeLoraConfig) -> MoeLoraConfig:
    """The configuration of the search's own adapter."""
    return dataclasses.replace(
        config,
        router=f"{__name__}.{SearchRouter.__name__}",
        router_kwargs={},
        router_modifiers={},
        expert=f"{__name__}.{SearchExperts.__name__}",
        expert_kwargs={},
        universal_expert="none",
        allocation="uniform",
        allocation_kwargs={},
        init="gaussian",
        init_kwargs={"std": 0.02, "std_b": 0.02},
        aux_losses={},
        gate_rescale="none",
    )


def _optimise(
    model: PeftModel,
    train: Iterable[Mapping[str, Any]],
    validation: Iterable[Mapping[str, Any]],
    steps: int,
    lr: float,
    selection_lr: float,
) -> tuple[list[float], list[float]]:
    """The losses on the training and on the validation batches."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    selections = [p for name, p in trainable.items() if name.endswith(".selection")]
    weights = [p for name, p in trainable.items() if not name.endswith(".selection")]
    inner = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    outer = torch.optim.Adam(selections, lr=selection_lr)
    found: tuple[list[float], list[float]] = ([], [])
    batches = (_endless("train", train), _endless("validation", validation))
    for _ in range(steps):
        for optimizer, source, losses in zip((inner, outer), batches, found, strict=True):
            loss = model(**{k: v.to(model.device) for k, v in next(source).items()}).loss
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise ConfigError(f"The search diverged; lower lr ({lr:g}) or selection_lr.")
            model.zero_grad()  # each batch gives both kinds a gradient, and moves one
            loss.backward()
            optimizer.step()
    return found


def _endless(key: str, batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The batches over and over."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ConfigError(f"{key} has no batches, or none the second time; give a sequence.")


def _entry(layer: MoeLoraLinear, top_k: int) -> dict[str, Any]:
    """What the allocation "modules" reads for one module."""
    selection_E = cast(Tensor, layer.moelora_router[_ADAPTER].selection)
    experts = int(_count(selection_E, LEAST_EXPERTS))
    ranks_E = _count(layer.tensors(_ADAPTER)["selection"])
    return {
        "num_experts": experts,
        "top_k": min(top_k, experts),
        "ranks": ranks_E[:experts].tolist(),
    }
