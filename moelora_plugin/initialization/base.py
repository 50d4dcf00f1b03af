"""What every initialisation is.

Shape suffixes: I in, O out, R total rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..types import LayerPlan


@dataclass(frozen=True)
class InitInput:
    """What there is to initialise, and from what.

    Attributes:
        tensors: "A" and "B" where the expert kind has them, to be filled in place; and "offset_A"
            (R0, I), "offset_B" (O, R0) where `offset_rank` asked for them.
        experts: views (A_i, B_i) of the same, one pair per expert.
        base_weight: gives the base's weight (O, I) in fp32 or wider; raises where it is quantised.
        shape: (O, I) of that weight.
        plan: the layer's experts.
        scaling: LoRA scale s.
        module_name: the target module's full name.
    """

    tensors: Mapping[str, Tensor]
    experts: Sequence[tuple[Tensor, Tensor]]
    base_weight: Callable[[], Tensor]
    shape: tuple[int, int]
    plan: LayerPlan
    scaling: float
    module_name: str

    @property
    def has_own_factors(self) -> bool:
        """Whether each expert is an A_i (r_i, I) and a B_i (O, r_i) that no other expert has."""
        rows, columns = self.shape
        found = [(*a.shape, *b.shape) for a, b in self.experts]
        expected = [(rank, columns, rows, rank) for rank in self.plan.ranks]
        whole = {"A": self.plan.total_rank * columns, "B": rows * self.plan.total_rank}
        return found == expected and all(
            self.tensors[name].numel() == size
            for name, size in whole.items()
            if name in self.tensors  # a frozen one is not
        )


class Initialization(ABC):
    """Initial values of A and B.

    Options are keyword-only parameters of the constructor and stand under `init_kwargs`.

    An initialisation that starts from the base's own weights (PiSSA and its kin) also takes what
    the experts then add out of the base. Elsewhere that changes the base weight; here it is a
    frozen low-rank offset, which the layer subtracts: base(x) + update(x) - offset_B offset_A x.
    So the base stays what it is: other adapters, `disable_adapter`, quantised bases and loading
    work as always, at the cost of one more low-rank product.

    Attributes:
        reads_data: whether it needs more than shapes (the base's weights, files). Such an
            initialisation is left out where an adapter is loaded for inference, whose values come
            from its file.
    """

    reads_data = False

    def offset_rank(self, plan: LayerPlan) -> int:
        """R0, the rank of the offset; 0 for none."""
        return 0

    def check_targets(self, names: Sequence[str]) -> None:  # noqa: B027 - most need no check
        """Before the first module: refuse target modules that do not fit what is read.

        Raises:
            ConfigError: they do not.
        """

    def check_experts(self, inputs: InitInput) -> None:  # noqa: B027 - most fill what there is
        """Before the values: refuse experts whose tensors cannot hold what is read.

        Every linear asks, and so does the configuration when it is made, on the meta device, with
        nominal widths and perhaps another number of experts.

        Raises:
            ConfigError: they cannot.
        """

    @abstractmethod
    def __call__(self, inputs: InitInput) -> None:
        """Fill the tensors in place."""
