"""MoeLoraConfig: everything an adapter is, validated without a model."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, get_args

from peft.config import PeftConfig
from peft.utils.peft_types import PeftType

from .errors import ConfigError
from .lookup import lookup, unknown_key_message
from .presets import PRESETS, resolve
from .types import GateRescale, GateRescaleScope

PEFT_TYPE = "MOELORA"
FORMAT_VERSION = 1

_GATE_RESCALES = ("auto", *get_args(GateRescale))
_SCOPES = get_args(GateRescaleScope)
_UNIVERSAL_EXPERTS = ("none", "one", "complement")
_MAPPINGS = (
    "site_kwargs",
    "router_kwargs",
    "router_score_kwargs",
    "router_input_kwargs",
    "router_modifiers",
    "expert_kwargs",
    "allocation_kwargs",
    "init_kwargs",
)
_BIASES = ("none", "all", "moelora_only")

C = TypeVar("C", bound=type)


def _refuse_unknown_keys(cls: C) -> C:
    """Answer an unknown keyword with the valid ones.

    PEFT would drop it with a warning when it reads a saved config, and a dataclass names no
    alternative.
    """
    generated: Callable[..., None] = vars(cls)["__init__"]
    known = {f.name for f in fields(cls) if f.init}

    @functools.wraps(generated)
    def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        unknown = sorted(set(kwargs) - known)
        if unknown:
            raise ConfigError(unknown_key_message("MoeLoraConfig", unknown[0], known))
        generated(self, *args, **kwargs)

    # Setting a dunder through setattr keeps the generated signature visible to help() and IDEs.
    setattr(cls, "__init__", checked_init)  # noqa: B010
    return cls


@_refuse_unknown_keys
@dataclass
class MoeLoraConfig(PeftConfig):
    """A mixture of LoRA experts on every target module.

    The defaults are the paper's (arXiv 2502.15828, Table 12): 20 experts of rank 4, 10 selected.

    Args:
        r: rank of one expert, >= 1; with `total_rank` the rank of all experts together.
        num_experts: experts per target module, >= 1. One expert is plain LoRA. With site "layer"
            the experts are the target modules themselves, and this number is not read.
        top_k: experts selected per token, 1 <= top_k <= num_experts.
        lora_alpha: the update is scaled by alpha / r, or alpha / sqrt(r) with `use_rslora`; see
            `scale`.
        lora_dropout: dropout on the experts' input, in [0, 1). The router sees the input undropped.
        target_modules: names (suffix match), one regular expression, or "all-linear"; PEFT's LoRA
            default for the architecture where left out.
        exclude_modules: names or a regular expression to leave out.
        layers_to_transform: layer indexes to adapt; needs `target_modules` as a list.
        layers_pattern: name of the layer list where it is not a common one.
        modules_to_save: further modules to train and save whole.
        trainable_token_indices: rows of the input embedding to train, or those of embeddings by
            name, as in PEFT's LoraConfig.
        bias: "none", "all" or "moelora_only": which of the base's biases train.
        site: where a routing decision is taken: "linear" (a router per target module), "block" (one
            router per feed-forward block, whose experts are whole blocks), "layer" (one per decoder
            layer, whose experts are the target modules) or "model".
        site_kwargs: options of the site.
        router: how logits become gates: a name such as "topk" (see docs/methods.md), an entry point
            of `moelora.routers` or a dotted path; so are the other parts below.
        router_kwargs: options of the router, by name; an unknown one is an error that lists them.
        router_score: where the logits come from ("linear").
        router_score_kwargs: options of the score.
        router_input: what is decided about: "token", "sequence", "prompt", "task", "cluster",
            "none".
        router_input_kwargs: options of the input.
        router_modifiers: what changes the router on the way, in this order, by name, like
            {"temperature": 0.5}.
        expert: the expert kind ("lora").
        expert_kwargs: options of the expert kind.
        universal_expert: one more expert that is always on: "none", "one" (with gate 1) or
            "complement" (with what the other gates leave of 1).
        total_rank: split `r` evenly over the experts; alpha / r then takes r as it stands.
        allocation: how experts and ranks are spread over the modules ("uniform").
        allocation_kwargs: options of the allocation.
        init: the experts' initialisation ("kaiming": A as in LoRA, B zero).
        init_kwargs: options of the initialisation.
        scale: the LoRA scale: "alpha" (alpha / r), "constant" (alpha) or "goat".
        aux_losses: coefficient of each auxiliary loss by name, like {"switch_lb": 0.001}, or a
            mapping of its options with the key "coefficient"; the loss is the mean over the
            adapted layers.
        gate_rescale: the exponent p of the gates in the experts' backward: "none" (1), "sqrt" (1/2,
            eq. 13), "exact" (0 on selected experts, eq. 11/12), or "auto": `build_optimizer` sets
            it ("sqrt" for grsgd and gradamw, "none" for rsgd and radamw); until then it means
            "none".
        gate_rescale_scope: "weights" (x receives the true gradient, eq. 13) or "output" (x receives
            the surrogate: Algorithm 1 and the reference code).
        use_rslora: scale by alpha / sqrt(r).
        format_version: version of this file format.

    Raises:
        ConfigError: a value out of range, an unknown name or an unknown key.
    """

    r: int = 4
    num_experts: int = 20
    top_k: int = 10
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    bias: str = "none"
    site: str = "linear"
    site_kwargs: dict[str, Any] = field(default_factory=dict)
    router: str = "topk"
    router_kwargs: dict[str, Any] = field(default_factory=dict)
    router_score: str = "linear"
    router_score_kwargs: dict[str, Any] = field(default_factory=dict)
    router_input: str = "token"
    router_input_kwargs: dict[str, Any] = field(default_factory=dict)
    router_modifiers: dict[str, Any] = field(default_factory=dict)
    expert: str = "lora"
    expert_kwargs: dict[str, Any] = field(default_factory=dict)
    universal_expert: str = "none"
    total_rank: bool = False
    allocation: str = "uniform"
    allocation_kwargs: dict[str, Any] = field(default_factory=dict)
    init: str = "kaiming"
    init_kwargs: dict[str, Any] = field(default_factory=dict)
    scale: str = "alpha"
    aux_losses: dict[str, Any] = field(default_factory=dict)
    gate_rescale: str = "auto"
    gate_rescale_scope: str = "weights"
    use_rslora: bool = False
    format_version: int = FORMAT_VERSION

    # No field: it is not saved. Whether the values of the adapter come from its file.
    from_file = False
    # Whether target_modules is a preset's choice, which not every base has all of.
    targets_by_default = False

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> MoeLoraConfig:
        """The preset's configuration; `overrides` win over it.

        A mapping such as `init_kwargs` or `aux_losses` is joined with the preset's key by key;
        None takes a key out of it. Naming another router, score, ... drops the preset's options for
        its own.

        Raises:
            ConfigError: unknown preset (the nearest names are offered), or one that needs a value
                which only the user can give, and did not.
        """
        config = cls(**resolve(name, lookup("presets", name, PRESETS), overrides))
        config.targets_by_default = overrides.get("target_modules") is None
        return config

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> MoeLoraConfig:
        """PEFT's own, noting that the adapter's values come from a file.

        PEFT passes the configuration on to inject the adapter whose weights it loads next; also to
        train on, an initialisation must then not ask for adapters or base weights again.
        """
        config: MoeLoraConfig = super().from_pretrained(*args, **kwargs)
        config.from_file = True
        return config

    def __post_init__(self) -> None:
        """Validate and normalise."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType(PEFT_TYPE)
        self._validate_numbers()
        self._validate_choice("bias", _BIASES)
        self._validate_choice("gate_rescale", _GATE_RESCALES)
        self._validate_choice("gate_rescale_scope", _SCOPES)
        self._validate_choice("universal_expert", _UNIVERSAL_EXPERTS)
        self._validate_mappings()
        self._validate_aux_losses()
        self._embed_allocation_file()
        if self.format_version != FORMAT_VERSION:
            raise ConfigError(
                f"format_version={self.format_version} was written by another release of moelora; "
                f"this one reads {FORMAT_VERSION}: install a matching release."
            )
        if isinstance(self.target_modules, str):
            for key in ("layers_to_transform", "layers_pattern"):
                if getattr(self, key) is not None:
                    raise ConfigError(
                        f"{key} needs target_modules as a list of names, got the string "
                        f"{self.target_modules!r}."
                    )
        # PEFT matches against a set; a sorted list keeps the saved file stable, and both are
        # accepted.
        for key in ("target_modules", "exclude_modules"):
            value = getattr(self, key)
            if value is not None and not isinstance(value, str):
                setattr(self, key, sorted(value))

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, and in the same order every time: PEFT keeps matched names in sets."""
        content: dict[str, Any] = super().to_dict()
        return {k: sorted(v) if isinstance(v, set) else v for k, v in content.items()}

    def _validate_numbers(self) -> None:
        for key in ("r", "num_experts", "top_k"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{key}={value!r} must be an integer of at least 1.")
        if self.top_k > self.num_experts:
            raise ConfigError(
                f"top_k={self.top_k} is more than num_experts={self.num_experts}; lower top_k or "
                "raise num_experts."
            )
        if not (_is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1):
            raise ConfigError(f"lora_dropout={self.lora_dropout!r} must be a number in [0, 1).")
        if not (_is_number(self.lora_alpha) and 0 < self.lora_alpha < math.inf):
            raise ConfigError(f"lora_alpha={self.lora_alpha!r} must be a positive number.")

    def _validate_aux_losses(self) -> None:
        if not isinstance(self.aux_losses, dict):
            raise ConfigError(
                f"aux_losses={self.aux_losses!r} must map names to coefficients, like "
                "{'switch_lb': 0.001}."
            )
        for name, value in self.aux_losses.items():
            coefficient = value.get("coefficient") if isinstance(value, dict) else value
            if not (_is_number(coefficient) and 0 <= coefficient < math.inf):
                raise ConfigError(
                    f"aux_losses[{name!r}]={value!r} must be a number of at least 0, or a mapping "
                    "with such a number as coefficient."
                )

    def _embed_allocation_file(self) -> None:
        """Put the content of an allocation's JSON file in its path's place.

        So a saved adapter does not need the file, which may change or be gone.
        """
        if self.allocation != "modules" or "path" not in self.allocation_kwargs:
            return
        path = Path(self.allocation_kwargs["path"])
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"allocation_kwargs['path']={str(path)!r} is no JSON file that can be read: {error}"
            ) from error
        rest = {key: value for key, value in self.allocation_kwargs.items() if key != "path"}
        self.allocation_kwargs = {**rest, "modules": content}

    def _validate_mappings(self) -> None:
        for key in _MAPPINGS:
            value = getattr(self, key)
            if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
                raise ConfigError(f"{key}={value!r} must map names to values.")

    def _validate_choice(self, key: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, key)
        if value not in choices:
            raise ConfigError(f"{key}={value!r} must be one of {', '.join(map(repr, choices))}.")


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
