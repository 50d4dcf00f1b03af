"""Parameters that never train, whoever says that everything does."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound="KeepsFrozen")


class KeepsFrozen(nn.Module):
    """A module that may hold tensors which its forward reads and which never train.

    They are parameters all the same, since an adapter is copied, sharded and counted by its named
    parameters (TRL makes its reference so), where a buffer would be left behind. PEFT sets
    `requires_grad` on all of an adapter's parameters, and loaders put new ones in their place:
    neither makes a frozen one train.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frozen_names: set[str] = set()

    def register_frozen(self, name: str, tensor: Tensor) -> None:
        """Add a tensor that does not train, of any dtype, as the attribute `name`."""
        self.frozen_names.add(name)
        self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """nn.Module's own, which assignments end in as well."""
        if param is not None and name in self.frozen_names:
            param.requires_grad_(False)
        super().register_parameter(name, param)

    def requires_grad_(self: M, requires_grad: bool = True) -> M:
        """nn.Module's own, for all that can train."""
        for module in self.modules():
            names = module.frozen_names if isinstance(module, KeepsFrozen) else ()
            for name, parameter in module.named_parameters(recurse=False):
                parameter.requires_grad_(requires_grad and name not in names)
        return self


def freeze_again(module: nn.Module) -> None:
    """Freeze what is to stay frozen in a module, after something has set `requires_grad`."""
    for inner in module.modules():
        if isinstance(inner, KeepsFrozen):
            for name in inner.frozen_names:
                inner.get_parameter(name).requires_grad_(False)
