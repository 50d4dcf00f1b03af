"""What every expert kind is: functions of the tensors that the layer owns.

Shape suffixes: T tokens, I in, O out, E experts, R total rank; r is one expert's rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import ConfigError, ExportError
from ..types import ExpertInput, ExpertPair, Gates, LayerPlan, Projection

# The experts' tensors by name. "A" and "B" are the factors; a kind may have others, or only some.
Tensors = Mapping[str, Tensor]


class ExpertKind(ABC):
    """How a layer's experts are shaped, mixed, taken apart and folded into one weight.

    One object belongs to one layer and adapter. Options are keyword-only parameters of the
    constructor and stand under `expert_kwargs`.

    Attributes:
        frozen: names of tensors that do not train, and are saved with the adapter.
        sums_outputs: whether the update is sum_i g_i s B_i A_i x over the pairs of `split`.

    Args:
        plan: the layer's experts.
        in_features: I.
        out_features: O.
    """

    frozen: frozenset[str] = frozenset()
    sums_outputs: bool = False

    def __init__(self, plan: LayerPlan, in_features: int, out_features: int) -> None:
        self.plan = plan
        self.in_features = in_features
        self.out_features = out_features

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by name."""

    def reset(self, tensors: Tensors) -> None:  # noqa: B027 - most kinds have nothing else
        """Initialise, in place, what the configured initialisation does not: all but A and B.

        Runs before the initialisation, so a kind may also lay down a frozen A here.
        """

    @abstractmethod
    def update(self, tensors: Tensors, inputs: ExpertInput, gates: Gates) -> Tensor:
        """The mixture's update (T, O)."""

    def project(
        self,
        tensors: Tensors,
        x_TI: Tensor,
        gate_EI: Tensor | None = None,
        dropout: float = 0.0,
        training: bool = False,
    ) -> Projection | None:
        """The product dropout(x) A^T together with a linear gate's; None for kinds without one.

        Args:
            tensors: the experts'.
            x_TI: the layer's input, without dropout and in its own dtype.
            gate_EI: the gate's weight.
            dropout: probability that an entry of x is dropped for the experts.
            training: whether the layer is in training mode, for dropout of the kind's own.
        """
        return None

    def by_groups(self, tokens: int, selected: float, device_type: str) -> bool:
        """Whether to compute the selected experts alone: `project` is not asked then.

        Args:
            tokens: T.
            selected: how many experts a token has on average. The others' gates are 0 by a mask,
                so that they learn nothing from the token.
            device_type: where the tokens are.
        """
        return False

    def add_update(
        self, onto_TO: Tensor, tensors: Tensors, inputs: ExpertInput, gates: Gates
    ) -> Tensor:
        """The sum of `onto_TO`, which stays as it is, and the update."""
        return onto_TO + self.update(tensors, inputs, gates)

    def split(self, tensors: Tensors) -> list[tuple[Tensor, Tensor]]:
        """Views (A_i, B_i), one pair per expert; a shared factor is in every pair.

        Empty where the kind has no such factors. Block-diagonal and mixed factors are narrower than
        the module where they work on slices of it.
        """
        return []

    def outputs(self, tensors: Tensors, x_TI: Tensor, scaling: float) -> Tensor:
        """Each expert's output s B_i A_i x (T, E, O), for auxiliary losses.

        Raises:
            ConfigError: the update is no such sum.
        """
        if not self.sums_outputs:
            raise ConfigError(
                f"A loss in aux_losses reads each expert's own output, and {type(self).__name__} "
                "has none; take that loss out or change expert."
            )
        outputs = [x_TI @ a.T @ b.T for a, b in self.split(tensors)]
        return torch.stack(outputs, 1) * scaling

    def static_update(self, tensors: Tensors, weights_E: Tensor, scaling: float) -> Tensor:
        """The weight update (O, I) for gates that do not depend on the input.

        Raises:
            ExportError: this kind is no update of the weight.
        """
        raise ExportError(
            f"{type(self).__name__} is no sum of low-rank updates, so it cannot be merged; serve "
            "the adapter unmerged."
        )

    def pairs(self, tensors: Tensors, scaling: float) -> list[ExpertPair]:
        """The factors that have Riemannian metrics; what is in none trains as it is."""
        return []

    def uniform_rank(self) -> int:
        """The rank that all experts have.

        Raises:
            ConfigError: the allocation gives them different ranks.
        """
        if not self.plan.is_uniform:
            raise ConfigError(
                f"{type(self).__name__} needs experts of one rank, but allocation gives "
                f"{list(self.plan.ranks)}; change allocation or expert."
            )
        return self.plan.ranks[0]
