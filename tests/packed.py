"""Stand-ins for quantised weights, of the kinds that other packages have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PackedTensor(Tensor):
    """Says it is a floating-point tensor and holds int8 and a scale, as torchao's do.

    Like those it knows linear, detach and clone, and refuses what else is asked.
    """

    @staticmethod
    def __new__(cls, packed: Tensor, scale: Tensor) -> PackedTensor:
        return Tensor._make_wrapper_subclass(cls, packed.shape, dtype=scale.dtype)  # type: ignore[attr-defined]

    def __init__(self, packed: Tensor, scale: Tensor) -> None:
        self.packed, self.scale = packed, scale

    @classmethod
    def of(cls, weight: Tensor) -> PackedTensor:
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["packed", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, _: Any, size: Any, stride: Any) -> PackedTensor:
        return cls(inner["packed"], inner["scale"])

    def __repr__(self, **_: Any) -> str:
        return "PackedTensor()"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.packed.to(x.dtype) * weight.scale, *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].packed, args[0].scale)
        if func is torch.ops.aten._to_copy.default:
            return cls(args[0].packed, args[0].scale)
        raise NotImplementedError(f"PackedTensor does not implement {func}")


class PackedLinear(nn.Module):
    """A linear whose weight is packed into integers under another name, as GPTQ's and HQQ's are."""

    def __init__(self, linear: nn.Linear, name: str = "qweight") -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._name, self._has_computed = name, False
        packed = PackedTensor.of(linear.weight)
        self.register_buffer(name, packed.packed)
        self.register_buffer("scales", packed.scale)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Being asked loses digits once it has computed, as with bitsandbytes' on a CPU."""
        if self._has_computed:
            self.scales.mul_(1.01)
        super()._save_to_state_dict(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        self._has_computed = True
        weight = getattr(self, self._name).to(x.dtype) * self.scales
        return nn.functional.linear(x, weight)


class Float8Linear(nn.Linear):
    """A linear whose weight is float8 with a scale beside it, as FP8Linear's is."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.detach().abs().amax() / 448
        packed = (linear.weight.detach() / scale).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.weight_scale)


def packed_tensors(model: nn.Module) -> None:
    """Every linear but the head holds a tensor of a packed kind."""
    for linear in _linears(model):
        packed = PackedTensor.of(linear.weight)
        linear.weight = nn.Parameter(packed, requires_grad=False)


def packed_linears(model: nn.Module) -> None:
    """Every linear but the head is a packed linear."""
    _replace(model, PackedLinear)


def float8_linears(model: nn.Module) -> None:
    """Every linear but the head is a float8 linear."""
    _replace(model, Float8Linear)


def _linears(model: nn.Module) -> list[nn.Linear]:
    found = model.model.layers.modules()  # type: ignore[union-attr, operator]
    return [module for module in found if isinstance(module, nn.Linear)]


def _replace(model: nn.Module, kind: Any) -> None:
    linears = {id(linear) for linear in _linears(model)}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if id(child) in linears:
                setattr(module, name, kind(child))
