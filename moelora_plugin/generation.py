"""What `generate` and continuous batching of transformers tell the layers, or are refused.

Router inputs that decide about a whole sequence decide by the prompt. Where that ends is known
to `generate` alone: its first call of the model may hold candidates for the answer, or only a part
of the prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .call import Generation, contexts_of
from .errors import ConfigError
from .layers import RoutedLayer

_MARK = "_moelora"


def wrap_generation(mixin: type) -> None:
    """Have transformers' `GenerationMixin` say where a prompt ends; a second time does nothing."""
    for name, wrap in (
        ("generate", _generate),
        ("init_continuous_batching", _init_continuous_batching),
    ):
        function = getattr(mixin, name, None)
        if function is not None and not hasattr(function, _MARK):
            wrapped = functools.wraps(function)(wrap(function))
            setattr(wrapped, _MARK, True)
            setattr(mixin, name, wrapped)


def _generate(generate: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _prompt_of(self, args, kwargs):
            return generate(self, *args, **kwargs)

    return wrapped


def _init_continuous_batching(init: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_continuous_batching(self)
        return init(self, *args, **kwargs)

    return wrapped


def refuse_continuous_batching(model: nn.Module) -> None:
    """Ask every active router before requests are taken, since an error in their thread is logged.

    Continuous batching packs pieces of several requests into one row and takes requests in and out
    from one call to the next, with a cache that does not tell whose tokens it holds.

    Raises:
        ConfigError: a router decides about more than one token.
    """
    for what, adapter in _needing_whole_sequences(model):
        raise ConfigError(
            f"Adapter {adapter!r} decides about whole sequences ({what}), which continuous "
            "batching does not show its layers; use generate in place of generate_batch, or route "
            "by token."
        )
    for context in contexts_of(model):
        if any(ids.ndim for ids in context.ids.values()):
            raise ConfigError(
                "routing_ids gives one id per sequence, and continuous batching has no fixed "
                "sequences; give one integer for all, or use generate in place of generate_batch."
            )


def _needing_whole_sequences(model: nn.Module) -> Iterator[tuple[str, str]]:
    """The active routers for which a token is not enough: what makes them so, and the adapter."""
    for layer in model.modules():
        if not isinstance(layer, RoutedLayer) or layer.disable_adapters or layer.merged:
            continue
        for adapter in layer.acting_adapters:
            if adapter not in layer.moelora_router:
                continue
            router_input = layer.moelora_input[adapter]
            if router_input.decides_over_sequence:
                yield f"router_input={getattr(router_input, 'key', '')!r}", adapter
            elif layer.mixes_rows(adapter):
                yield "a capacity or expert choice", adapter


@contextmanager
def _prompt_of(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Let the calls of the model inside the block know where the prompt ends."""
    what, _ = next(_needing_whole_sequences(model), (None, None))
    config = _config_of(model, args, kwargs)
    # What an assistant drafts is checked by another model, and it goes on from its cache.
    if what is None or getattr(config, "is_assistant", False):
        yield
        return
    generation = Generation(_length_of_prompt(model, args, kwargs))
    _refuse_unknown_prompt(what, generation, model, args, kwargs)
    contexts = contexts_of(model)
    for context in contexts:
        context.generations.append(generation)
    try:
        yield
    finally:
        for context in contexts:
            context.generations.pop()


def _length_of_prompt(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """How many positions `generate` is given, padding included; None where the model adds some."""
    if getattr(model.config, "is_encoder_decoder", False):
        return None if kwargs.get("decoder_input_ids") is not None else 1
    given = kwargs.get("inputs_embeds")
    if given is None:
        given = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    return given.shape[1] if isinstance(given, Tensor) and given.ndim > 1 else None


def _refuse_unknown_prompt(
    what: str, generation: Generation, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse what would have a decision taken over something else than the prompt.

    Raises:
        ConfigError: the prompt goes on from a cache, or its end is not known where its first call
            may hold more or less than it.
    """
    config = _config_of(model, args, kwargs)

    def option(name: str) -> Any:
        return kwargs[name] if name in kwargs else getattr(config, name, None)

    for value in kwargs.values():
        length = getattr(type(value), "get_seq_length", None)
        if callable(length) and _holds_something(value):
            raise ConfigError(
                f"The adapter ({what}) decides by the whole prompt, and this generation goes on "
                "from a cache whose tokens have been decided about already; call generate with "
                "the whole prompt and without that cache."
            )
    if generation.ends is None:
        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
            if option(name) is not None:
                raise ConfigError(
                    f"The adapter ({what}) decides by the prompt, whose end cannot be told from "
                    f"the candidates of {name} here; leave {name} out."
                )
        if option("prefill_chunk_size") is not None:
            raise ConfigError(
                f"The adapter ({what}) decides by the whole prompt; set prefill_chunk_size to None."
            )


def _config_of(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    return given if given is not None else getattr(model, "generation_config", None)


def _holds_something(cache: Any) -> bool:
    try:
        return bool(cache.get_seq_length() > 0)
    except ValueError:  # a cache without attention, which does not count
        begun = getattr(cache, "has_previous_state", False)
        return bool(begun() if callable(begun) else begun)
