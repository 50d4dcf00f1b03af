"""A linear whose experts can be folded into its base weight.

Shape suffixes: O out, I in, E experts.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError, ExportError
from ..experts import ExpertKind
from ..quantization import is_plain
from ..types import GateRescaleScope, LayerPlan
from .gate_source import GateSource
from .linear_maps import adds_updates
from .routed import RoutedLayer, Shared


@dataclass(frozen=True)
class Mixture:
    """What does not train of one adapter in one linear.

    Attributes:
        plan: its experts, the universal one included.
        experts: their kind.
        scaling: LoRA scale s.
        scope: what x receives in the backward.
        universal: how the universal expert is weighed, or "none".
    """

    plan: LayerPlan
    experts: ExpertKind
    scaling: float
    scope: GateRescaleScope
    universal: str


class FoldingLinear(RoutedLayer):
    """What of a `MoeLoraLinear` is about one weight update for all tokens: merging and exporting.

    That is exact where the gates ignore the input, and an approximation with gates that are given.
    """

    def __init__(self, shared: Shared) -> None:
        super().__init__(shared)
        self.moelora_mixture: dict[str, Mixture] = {}
        # Adapters whose gates come from elsewhere; the others have a router here.
        self.moelora_gate_source: dict[str, GateSource] = {}
        self._merged_gates: dict[str, Tensor] = {}

    @abstractmethod
    def tensors(self, adapter: str = "default") -> dict[str, Tensor]:
        """The adapter's expert tensors by name: "A", "B" and what else the expert kind has."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters whose gates do not depend on the input into the base weight.

        Raises:
            ExportError: the gates follow the input, the base weight is quantised, or the base does
                more than to multiply by it.
        """
        for adapter in check_adapters_to_merge(self, adapter_names) or []:
            if adapter not in self.moelora_mixture:
                continue
            self._refuse_unfoldable()
            weights_E = self._fixed_gates(adapter)
            update = self.static_update(adapter, weights_E)
            if safe_merge and not bool(torch.isfinite(update).all()):
                raise ExportError(
                    f"Merging adapter {adapter!r} gives NaN or infinite weights; it seems broken."
                )
            self.fold(update)
            self.merged_adapters.append(adapter)
            self._merged_gates[adapter] = weights_E

    def refuse_merge(self, adapter: str, weights_E: Tensor | None = None) -> None:
        """Say whether `merge` would work, without touching the base weight.

        Args:
            adapter: whose experts.
            weights_E: gates (E,) to fold with; the router's own where it ignores the input.

        Raises:
            ExportError: the gates follow the input, the experts are no update of the weight, or the
                base weight is quantised or not multiplied by the input alone.
        """
        self._refuse_unfoldable()
        weights_E = self._fixed_gates(adapter) if weights_E is None else weights_E
        # On the meta device: what raises does so without a product.
        tensors = {name: t.detach().to("meta") for name, t in self.tensors(adapter).items()}
        self._mixed(adapter, tensors, weights_E)

    def unmerge(self) -> None:
        """Take every merged adapter out of the base weight again (up to rounding)."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            # The gates may hang on a task id that has changed since.
            self.fold(-self.static_update(adapter, self._merged_gates.pop(adapter, None)))

    def static_update(self, adapter: str = "default", weights_E: Tensor | None = None) -> Tensor:
        """The weight update in the base weight's own layout, for fixed gates.

        Args:
            adapter: whose experts.
            weights_E: gates (E,); the router's own where it ignores the input.

        Raises:
            ExportError: no gates given and the router's follow the input, or the expert kind is no
                update of the weight.
        """
        weights_E = self._fixed_gates(adapter) if weights_E is None else weights_E
        tensors = {name: tensor.detach() for name, tensor in self.tensors(adapter).items()}
        update_OI = self._mixed(adapter, tensors, weights_E)
        if "offset_A" in tensors:
            update_OI = update_OI - tensors["offset_B"] @ tensors["offset_A"]
        return update_OI.T if isinstance(self.get_base_layer(), Conv1D) else update_OI

    def _mixed(self, adapter: str, tensors: Mapping[str, Tensor], weights_E: Tensor) -> Tensor:
        """The experts' weight update (O, I) for given gates, where the tensors are."""
        mixture = self.moelora_mixture[adapter]
        weights_E = weights_E.detach().to(next(iter(tensors.values())).device)
        weights_E = with_universal(weights_E, mixture.universal)
        return mixture.experts.static_update(tensors, weights_E, mixture.scaling)

    def mean_weights(
        self, mean_of: Callable[[RoutedLayer], Tensor], adapter: str = "default"
    ) -> Tensor:
        """The gates (E,) of an approximate merge.

        Args:
            mean_of: gives the mean gates of a layer with a router.
            adapter: whose experts.

        Raises:
            ExportError: these experts cannot be folded into one linear.
        """
        source = self.moelora_gate_source.get(adapter)
        return mean_of(self) if source is None else source.mean_weights(self, adapter, mean_of)

    def _fixed_gates(self, adapter: str) -> Tensor:
        """The gates (E,) where they ignore the input.

        Raises:
            ExportError: they follow it.
        """
        source = self.moelora_gate_source.get(adapter)
        weights_E = (
            self.fixed_weights(adapter) if source is None else source.fixed_weights(self, adapter)
        )
        if weights_E is None:
            raise ExportError(
                "The gates of this adapter follow the input, so no single weight equals it; serve "
                "it unmerged, or write an approximation with `moelora export ADAPTER --to merged "
                "--strategy mean-gate --out DIR`."
            )
        return weights_E

    def apply_update(self, x: Tensor, update: Tensor) -> Tensor:
        """What an update in the base weight's layout adds to the output."""
        x = self._cast_input_dtype(x, update.dtype)
        return x @ update if isinstance(self.get_base_layer(), Conv1D) else x @ update.T

    def fold(self, update: Tensor) -> None:
        """Add an update in the base weight's layout to the base weight, for good.

        Raises:
            ExportError: the base weight is quantised.
        """
        weight = self._base_weight()
        weight.data = weight.data + update.to(weight.dtype)

    def _refuse_unfoldable(self) -> None:
        self._base_weight()
        if not adds_updates(self.get_base_layer()):
            raise ExportError(
                f"Cannot merge into {type(self.get_base_layer()).__name__}: its forward does more "
                "to the input than to multiply by the weight and to add the bias; serve the "
                "adapter unmerged."
            )

    def _base_weight(self) -> nn.Parameter:
        weight = getattr(self.get_base_layer(), "weight", None)
        if not isinstance(weight, nn.Parameter) or not is_plain(weight):
            kind = type(self.get_base_layer()).__name__
            if weight is not None and is_plain(weight):
                raise ExportError(
                    f"Cannot merge into {kind}: its weight is computed from other parameters "
                    "(weight_norm, a parametrization, a sharded model); remove that first "
                    "(remove_parametrizations, summon_full_params), or serve the adapter unmerged."
                )
            raise ExportError(
                f"Cannot merge into {kind}: its weight is quantised; load the base in a "
                "floating-point dtype."
            )
        return cast(nn.Parameter, weight)

    def _float_base_weight(self) -> Tensor:
        """The base's weight (O, I) in fp32 or wider, without gradient.

        Raises:
            ConfigError: it is quantised.
        """
        try:
            weight = self._base_weight().detach()
        except ExportError as error:
            raise ConfigError(
                f"This adapter reads the weights of {type(self.get_base_layer()).__name__}, which "
                "are computed, sharded (FSDP 1) or quantised; load the base in a floating-point "
                "dtype and whole, or change init or expert."
            ) from error
        weight = weight.T if isinstance(self.get_base_layer(), Conv1D) else weight
        return weight.to(torch.promote_types(weight.dtype, torch.float32))


def refuse_tied(model: nn.Module, layers: Mapping[str, FoldingLinear]) -> None:
    """Refuse to fold into a weight that other modules of the model read as well.

    Args:
        model: the model.
        layers: what is to be folded, by name.

    Raises:
        ExportError: naming the first.
    """
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    for name, layer in layers.items():
        if holders[id(getattr(layer.get_base_layer(), "weight", None))] > 1:
            raise ExportError(
                f"{name} shares its weight with another module (tie_word_embeddings, for an "
                "lm_head), which a merge would change too; serve the adapter unmerged, or train "
                "one on a base without tied weights."
            )


def with_universal(weights: Tensor, universal: str) -> Tensor:
    """Gates (..., E) with the universal expert's as the last one."""
    if universal == "none":
        return weights
    total = weights.sum(-1, keepdim=True)
    extra = torch.ones_like(total) if universal == "one" else 1 - total
    return torch.cat([weights, extra], -1)
