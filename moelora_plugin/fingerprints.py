"""What tells one model from another: digests of every byte, and samples that survive a cast.

A digest is exact: it names the entries of a cache and shows that a model is bitwise what it was.
Samples hold across dtypes: they recognise the base that an adapter, or a set of clusters, was made
with. Quantised weights have a digest, of what they are packed into, and no samples.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .errors import first_line
from .quantization import hidden_tensors, is_packed, state_of

_SAMPLES = 16
# bf16, fp16 and fp32 copies of a value differ by at most 2^-8 of it; 2 % leaves room for that and
# still tells two models apart at the first value.
_RELATIVE_TOLERANCE = 0.02
_ABSOLUTE_TOLERANCE = 1e-6  # fp16 flushes values below this to multiples of 6e-8


class UnreadableError(Exception):
    """A tensor whose bytes cannot be had; says which and why."""


def weights_digest(model: nn.Module) -> str:
    """sha256 over name, kind, dtype, shape and bytes of every parameter and every saved buffer.

    Of quantised weights the scales count too, wherever they are kept.

    Raises:
        UnreadableError: a tensor has no values here (offloaded) or does not give its bytes.
    """
    digest = hashlib.sha256()
    known: dict[tuple[Any, ...], str] = {}
    for name, value in _everything(model):
        for part in _parts(name, value):
            place = (part.data_ptr(), part.dtype, part.shape, part.stride())  # tied weights
            if place not in known:
                known[place] = _sha256(name, part)
            kind = f"{type(value).__name__} {part.dtype} {tuple(part.shape)}"
            digest.update(f"{name} {kind} {known[place]}\n".encode())
    return digest.hexdigest()


def _everything(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the model computes with, and its name."""
    for name, tensor in state_of(model).items():
        yield name, tensor
        if type(tensor) not in (Tensor, nn.Parameter):
            yield from ((f"{name}.{key}", inner) for key, inner in hidden_tensors(tensor))
    for name, module in model.named_modules():
        if is_packed(module):
            yield from ((f"{name}.{key}", inner) for key, inner in hidden_tensors(module))


def brief_digest(model: nn.Module, prefix: str | None = None) -> str | None:
    """sha256 of a few values of each parameter, for a record.

    Args:
        model: the model.
        prefix: what marks an adapter's parameters, which do not count, nor do modules that it
            saves whole.

    Returns:
        None where a parameter has no values here or does not give them.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if prefix is not None and (prefix in name or "modules_to_save" in name):
            continue
        try:
            for part in _parts(name, parameter):
                values = [float(value) for value in _spread(part.detach()).cpu()]
                digest.update(json.dumps([list(part.shape), values]).encode())
        except (UnreadableError, RuntimeError, TypeError):
            return None
    return digest.hexdigest()


def samples_of(weights: Sequence[object]) -> list[float] | None:
    """Sixteen values, spread over the weights; None where there are none to be read."""
    if not weights or not all(map(_has_values, weights)):
        return None
    samples = []
    for k in range(_SAMPLES):
        flat = cast(Tensor, weights[k * len(weights) // _SAMPLES]).detach().flatten()
        samples.append(float(flat[(2 * k + 1) * flat.numel() // (2 * _SAMPLES)]))
    return samples


def embedding_fingerprint(model: nn.Module) -> dict[str, Any] | None:
    """Shape of the input embeddings and a few of their values, without what an adapter changes.

    Quantised models mostly keep their embeddings as they are. None where these have no values to be
    read.
    """
    try:
        layer: Any = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # not a transformers model, or one without
        return None
    layer = getattr(layer, "original_module", layer)
    layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    weight: Any = getattr(layer, "weight", None)
    samples = samples_of([weight])
    return None if samples is None else {"shape": list(weight.shape), "samples": samples}


def same_samples(found: Sequence[float], expected: Sequence[float]) -> bool:
    """Whether two models' samples are those of one model, in whatever dtypes."""
    return len(found) == len(expected) and all(
        abs(a - b) <= _RELATIVE_TOLERANCE * max(abs(a), abs(b)) + _ABSOLUTE_TOLERANCE
        for a, b in zip(found, expected, strict=True)
    )


def is_fingerprint(value: object, *keys: str) -> bool:
    """Whether what a file holds is a fingerprint: these keys, and finite samples."""
    samples = value.get("samples") if isinstance(value, Mapping) else None
    return (
        isinstance(value, Mapping)
        and all(key in value for key in keys)
        and isinstance(samples, list)
        and all(map(is_finite_number, samples))
    )


def is_finite_number(value: object) -> bool:
    """Whether a value of a JSON file is a number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def _has_values(weight: object) -> bool:
    return (
        type(weight) in (Tensor, nn.Parameter)
        and isinstance(weight, Tensor)
        and weight.dtype.is_floating_point
        and weight.dtype.itemsize > 1  # float8 has its scale elsewhere
        and not weight.is_meta
        and weight.numel() > 0
    )


def _parts(name: str, tensor: Tensor) -> list[Tensor]:
    """The ordinary tensors that a tensor is made of: itself, or what a subclass packs."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        return [part for key in flatten()[0] for part in _parts(name, getattr(tensor, key))]
    if tensor.is_meta:
        raise UnreadableError(f"{name} has no values here")
    return [tensor.detach().as_subclass(Tensor)]


def _sha256(name: str, tensor: Tensor) -> str:
    try:
        flat = tensor.cpu().contiguous().reshape(-1)
        return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
    except (RuntimeError, TypeError) as error:
        raise UnreadableError(f"{name} does not give its bytes: {first_line(error)}") from error


def _spread(tensor: Tensor) -> Tensor:
    flat = tensor.flatten()
    step = max(1, flat.numel() // _SAMPLES)
    return flat[step // 2 :: step][:_SAMPLES]
