"""A small network as the gate.

Shape suffixes: N rows, I in, E experts, H hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...types import LayerPlan, Rows
from ...values import MAX_ROUNDS
from .base import Score, require_choice, require_count, reset_maps

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.nn.functional.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "tanh": torch.tanh,
}


class MlpScore(Score):
    """W_n act(... act(W_1 x)), with biases: n linear maps, n - 1 hidden layers.

    X-LoRA's classifier is this with relu and dropout (arXiv 2402.07148, `xlora_depth` linear maps
    of `xlora_size`). MoA widens its router to a SwiGLU of hidden width swi_x * E (heterogeneous
    MoA, arXiv 2506.05928): `swi_x=..., gated=True, activation="silu"`.

    Args:
        in_features: I.
        plan: the layer's experts.
        width: H, 64 where neither it nor `swi_x` is given.
        swi_x: H as a multiple of E, in place of `width`.
        depth: linear maps, 1 being a linear gate with a bias.
        activation: "relu", "silu", "gelu" or "tanh".
        gated: hidden layers are act(W x) * V x, two maps each (without biases, as SwiGLU has it).
        dropout: on each hidden layer.
        bias: biases, zero at first.
    """

    def __init__(
        self,
        in_features: int,
        plan: LayerPlan,
        *,
        width: int | None = None,
        swi_x: int | None = None,
        depth: int = 2,
        activation: str = "relu",
        gated: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__(in_features, plan)
        require_count("depth", depth, MAX_ROUNDS)
        require_choice("activation", activation, tuple(_ACTIVATIONS))
        if width is not None and swi_x is not None:
            raise ConfigError(
                "router_score_kwargs['swi_x'] takes the place of 'width'; set one of them."
            )
        if not 0 <= dropout < 1:
            raise ConfigError(f"router_score_kwargs['dropout']={dropout!r} must be in [0, 1).")
        if swi_x is not None:
            require_count("swi_x", swi_x)
            width = swi_x * plan.num_experts
        width = 64 if width is None else width
        require_count("width", width)
        self.depth, self.gated, self.dropout = depth, gated, dropout
        self.activation = _ACTIVATIONS[activation]
        sizes = [in_features, *[width] * (depth - 1), plan.num_experts]
        for layer, (inner, outer) in enumerate(itertools.pairwise(sizes)):
            hidden = layer < depth - 1
            self._add(f"weight_{layer}", (outer, inner))
            self._add(f"gate_{layer}", (outer, inner) if gated and hidden else None)
            self._add(f"bias_{layer}", (outer,) if bias and not (gated and hidden) else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each map as `torch.nn.Linear` draws its weight; biases are zero."""
        reset_maps(self)

    def forward(self, rows: Rows, a: Tensor | None) -> Tensor:
        """Logits (N, E)."""
        h = self.features(rows)
        for layer in range(self.depth - 1):
            hidden = self.activation(self._map(layer, h))
            if self.gated:
                hidden = hidden * torch.nn.functional.linear(h, getattr(self, f"gate_{layer}"))
            h = torch.nn.functional.dropout(hidden, self.dropout, self.training)
        return self._map(self.depth - 1, h)

    def _map(self, layer: int, h: Tensor) -> Tensor:
        weight, bias = getattr(self, f"weight_{layer}"), getattr(self, f"bias_{layer}")
        return torch.nn.functional.linear(h, weight, bias)

    def _add(self, name: str, shape: tuple[int, ...] | None) -> None:
        parameter = None if shape is None else nn.Parameter(torch.empty(shape))
        self.register_parameter(name, parameter)
