"""Whether a base is the one that an adapter was trained on.

Folders move and dtypes change, so a base is known by a few of its weights. Whether it is quantised
is noted beside: the adapter then learns to make up for that.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from .errors import AdapterError, first_line
from .fingerprints import embedding_fingerprint, same_samples, samples_of
from .model import moelora_layers
from .quantization import quantization_of


def base_fingerprint(model: nn.Module) -> dict[str, Any] | None:
    """What tells the base from others: shapes of the adapted modules and a few of their weights.

    None where the base weights are not plain floating-point tensors (quantised or not
    materialised).
    """
    weights: list[Any] = [
        getattr(layer.get_base_layer(), "weight", None) for layer in moelora_layers(model).values()
    ]
    samples = samples_of(weights)
    if samples is None:
        return None
    # Names differ with the wrapping (PeftModel or bare); the order of modules does not.
    shapes = json.dumps([list(w.shape) for w in weights])
    return {
        "modules": len(weights),
        "shapes_sha256": hashlib.sha256(shapes.encode()).hexdigest(),
        "samples": samples,
    }


def record_base(model: nn.Module) -> dict[str, Any]:
    """What the manifest says of the base, as far as it can be had."""
    parts = {
        "base_fingerprint": base_fingerprint,
        "base_embeddings": embedding_fingerprint,
        "base_quantization": quantization_of,
    }
    found: dict[str, Any] = {}
    for key, read in parts.items():
        try:
            found[key] = read(model)
        except Exception as error:  # whatever a tensor of another library raises
            warnings.warn(
                f"The adapter is saved without {key}, which another base would be noticed by: "
                f"{first_line(error)}.",
                stacklevel=3,
            )
    return found


def refuse_other_name(base: str, recorded: str | None) -> None:
    """Two hub ids that differ are two models. Folders move, so their names say nothing."""
    if recorded and base != recorded and not os.path.isdir(base) and not os.path.isdir(recorded):
        raise AdapterError(
            f"The adapter was trained on {recorded!r}, not on {base!r}; drop --base, or pass "
            "--allow-base-mismatch if you mean it."
        )


def refuse_other_weights(model: nn.Module, manifest: Mapping[str, Any], base: str) -> None:
    """Compare the adapted weights or, where those are quantised now or then, the embeddings."""
    found, expected = base_fingerprint(model), manifest.get("base_fingerprint")
    if expected is not None and found is not None:
        same = found["shapes_sha256"] == expected["shapes_sha256"]
    else:
        found, expected = embedding_fingerprint(model), manifest.get("base_embeddings")
        if expected is None or found is None:
            return
        same = found["shape"] == expected["shape"]
    if not (same and same_samples(found["samples"], expected["samples"])):
        raise AdapterError(
            f"The weights of {base!r} are not those of the base this adapter was trained on; pass "
            "that base (--base), or --allow-base-mismatch if you mean it."
        )


def warn_of_quantization(model: nn.Module, manifest: Mapping[str, Any], base: str) -> None:
    """An adapter learns to make up for the base's rounding too, so the other base answers worse."""
    found = quantization_of(model)
    if "base_quantization" in manifest:
        expected = manifest["base_quantization"]
    elif manifest and moelora_layers(model) and manifest.get("base_fingerprint") is None:
        expected = "quantised"  # as older releases said it
    else:
        return
    if found != expected and not (found and expected == "quantised"):
        was, now = ("plain" if one is None else one for one in (expected, found))
        warnings.warn(
            f"The adapter was trained on a base whose weights were {was}, and those of {base!r} "
            f"are {now}, so it answers otherwise than it was trained to; load the base as it was.",
            stacklevel=3,
        )
