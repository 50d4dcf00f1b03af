"""What every score is.

Shape suffixes: N rows, I in, E experts, R total rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...frozen import KeepsFrozen
from ...types import LayerPlan, Rows


class Score(KeepsFrozen, ABC):
    """Rows -> logits (N, E), for one target module.

    Options are keyword-only parameters of the constructor and stand under `router_score_kwargs`.
    Parameters are direct attributes (no submodules), as a router's; tensors that do not train are
    added by `register_frozen`.

    Attributes:
        reads_input: whether the logits depend on `rows.x`.
        reads_ids: whether they depend on `rows.ids`.

    Args:
        in_features: I.
        plan: the layer's experts.
    """

    reads_input = True
    reads_ids = False

    def __init__(self, in_features: int, plan: LayerPlan) -> None:
        super().__init__()
        self.in_features = in_features
        self.plan = plan

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the parameters afresh."""

    @abstractmethod
    def forward(self, rows: Rows, a: Tensor | None) -> Tensor:
        """Logits (N, E) of the rows.

        Args:
            rows: what is decided about.
            a: the experts' stacked A (R, I), for scores that read their activations A x.
        """

    def matrix(self) -> Tensor | None:
        """The W (E, I) whose product with the rows the score takes from `Rows.product`, if any."""
        return None

    def read_experts(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Set what follows from the experts' initial (A_i, B_i), where anything does."""

    def features(self, rows: Rows) -> Tensor:
        """The rows' features (N, I).

        Raises:
            ConfigError: the router's input gives none.
        """
        if rows.x is None:
            raise ConfigError(
                f"{type(self).__name__} reads features and this router_input gives none; set "
                "router_input to 'token', 'sequence' or 'prompt', or router_score to 'embedding' "
                "(reads ids) or 'static'."
            )
        return rows.x

    def expert_activations(self, rows: Rows, a: Tensor | None) -> tuple[Tensor, ...]:
        """Each expert's own A_i x (N, r_i).

        Raises:
            ConfigError: the experts have no A each.
        """
        x_NI = self.features(rows)
        total = self.plan.total_rank
        # A universal expert's ranks come last and are not decided about.
        if a is None or a.ndim != 2 or len(a) < total or a.shape[1] != x_NI.shape[1]:
            raise ConfigError(
                f"{type(self).__name__} compares the experts' own activations A_i x, and these "
                "experts have no A each; set expert='lora' and site='linear', or another "
                "router_score."
            )
        return torch.split(torch.nn.functional.linear(x_NI, a[:total]), list(self.plan.ranks), -1)


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Inside, products are in the dtype of their factors. The meta device knows no autocast."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def reset_linear(weight: Tensor) -> None:
    """`torch.nn.Linear`'s own initialisation of a weight (out, in)."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


def reset_maps(score: Score) -> None:
    """Every map of a score as `torch.nn.Linear` draws its weight; biases are zero."""
    for name, parameter in score.named_parameters():
        if name.startswith("bias"):
            nn.init.zeros_(parameter)
        else:
            reset_linear(parameter)


def widened(tensor: Tensor) -> Tensor:
    """In fp32 or wider: norms and softmaxes of halves are too coarse."""
    if tensor.dtype is torch.float32:  # at once, since every decoded token asks
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def require_count(key: str, value: object, most: int | None = None) -> None:
    """Refuse an option that is no integer of at least 1, or more than `most`.

    Raises:
        ConfigError: with the key to change.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"router_score_kwargs[{key!r}]={value!r} must be an integer of at least 1."
        )
    if most is not None and value > most:
        raise ConfigError(f"router_score_kwargs[{key!r}]={value} must not be more than {most:,}.")


def require_choice(key: str, value: object, choices: Sequence[str]) -> None:
    """Refuse an option that is none of `choices`.

    Raises:
        ConfigError: with the key to change.
    """
    if value not in choices:
        raise ConfigError(
            f"router_score_kwargs[{key!r}]={value!r} must be one of "
            f"{', '.join(map(repr, choices))}."
        )
