"""Which tokens each layer sees: the model's own, or those of a part of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..call.context import CallContext, Part
from .routed import RoutedLayer


def assign_streams(model: nn.Module, context: CallContext) -> None:
    """Tell each layer whose tokens it sees, and watch the parts of the model that say so.

    A part is a model of transformers inside the model: the encoder and the decoder of an
    encoder-decoder, the tower of images beside a language model, the body under a head. The
    innermost one around a layer is called with the layer's own tokens and their mask, also where a
    program calls it by itself. Where the part is the model's text decoder, the model's arguments
    say the same and more, so its layers go by those.

    Args:
        model: the model with its layers.
        context: what they share.
    """
    named = dict(model.named_modules())
    layers = {name: module for name, module in named.items() if isinstance(module, RoutedLayer)}
    parts = [n for n, module in named.items() if n and isinstance(module, PreTrainedModel)]
    innermost = [p for p in parts if not any(_inside(other, p) for other in parts if other != p)]
    has_encoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    several = len(innermost) > 1 or has_encoder
    text, head = _text_of(model, named), _module(model, "get_output_embeddings")

    def in_text(name: str) -> bool:
        return text is not None and _inside(name, text)

    def is_text(part: str) -> bool:
        is_around = text is not None and text != part and _inside(text, part)
        return not several or is_around or (not has_encoder and in_text(part))

    watched = {part for part in parts if is_text(part) and any(_inside(n, part) for n in layers)}
    for name, layer in layers.items():
        owner = max((p for p in innermost if _inside(name, p)), key=len, default="")
        is_head = head is not None and any(module is layer for module in head.modules())
        if not several or (not has_encoder and (in_text(name) or is_head)):
            layer.stream = None
        else:
            layer.stream = (text or owner) if is_head else owner
        layer.sees_images = layer.stream is not None and not has_encoder
        watched |= {layer.stream} if layer.stream else set()
    context.watch(
        model,
        [Part(p, is_text(p), has_encoder and in_text(p)) for p in parts if p in watched],
        has_memories=several,
    )


def _text_of(model: nn.Module, named: Mapping[str, nn.Module]) -> str | None:
    """The name of the text decoder; None where the model has none of its own."""
    decoder = _module(model, "get_decoder")
    if decoder is None or decoder is model or decoder is getattr(model, "base_model", None):
        return None
    return next((name for name, module in named.items() if module is decoder), None)


def _module(model: Any, getter: str) -> nn.Module | None:
    found = getattr(model, getter, None)
    try:
        module = found() if callable(found) else None
    except (AttributeError, NotImplementedError):  # the model has none
        return None
    return module if isinstance(module, nn.Module) else None


def _inside(name: str, whole: str) -> bool:
    return name == whole or name.startswith(f"{whole}.")
