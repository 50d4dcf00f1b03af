"""MoeLoraConfig: everything an adapter is, validated without a model."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from peft.config import PeftConfig
from peft.utils.peft_types import PeftType

from .errors import AdapterError, ConfigError
from .field_checks import check_fields, check_mappings, check_patterns, read_allocation
from .lookup import given, unknown_key_message
from .part_checks import check_parts, import_parts
from .presets import PRESETS, resolve
from .reading import read_json
from .values import SavedPaths, shown

if TYPE_CHECKING:
    from .types import GateRescale

PEFT_TYPE = "MOELORA"
FORMAT_VERSION = 1

_NO_SHAPES: Mapping[str, tuple[int, ...]] = {}

# Keys that may change in a saved configuration without the adapter answering otherwise: where its
# base lies now, what saving again notes, and what training alone reads.
FREE_KEYS = frozenset(
    {
        *("base_model_name_or_path", "revision", "task_type", "auto_mapping"),
        *("inference_mode", "peft_version", "runtime_config"),
        *("lora_dropout", "aux_losses", "gate_rescale", "gate_rescale_scope"),
        "checksum",
    }
)

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
        checksum = kwargs.pop("checksum", None)
        unknown = sorted(set(kwargs) - known)
        if unknown:
            raise ConfigError(unknown_key_message("MoeLoraConfig", unknown[0], known))
        generated(self, *args, **kwargs)
        # Last, since what else is wrong with an edited file says more. A member of the enum is not
        # from a file: somebody changes a configuration in memory.
        in_memory = isinstance(kwargs.get("peft_type"), PeftType)
        if checksum not in (None, checksum_of(kwargs)) and not in_memory:
            raise AdapterError(
                "The adapter's configuration was changed after it was saved, and it would answer "
                "otherwise; save or download it again, or, if you mean it, take 'checksum' out of "
                "adapter_config.json."
            )

    # Setting a dunder through setattr keeps the generated signature visible to help() and IDEs.
    setattr(cls, "__init__", checked_init)  # noqa: B010
    return cls


def checksum_of(content: Mapping[str, Any]) -> str:
    """Digest of what a configuration's file says that decides answers.

    It stands in the file itself, since it is all that stock loaders read. A key that is missing
    stands for its default, so that a release may add keys; defaults never change. Names may stand
    in any order.
    """
    defaults = {f.name: default_of(f) for f in fields(MoeLoraConfig)}
    deciding = {
        key: sorted(value) if _is_names(value) else value
        for key, value in content.items()
        if key not in FREE_KEYS and key != "peft_type" and value != defaults.get(key, ...)
    }
    text = json.dumps(deciding, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def default_of(one: Field[Any]) -> Any:
    """What a field holds where nothing is said; ... where that is an error."""
    if one.default is not MISSING:
        return one.default
    return ... if one.default_factory is MISSING else one.default_factory()


def _is_names(value: Any) -> bool:
    return isinstance(value, list | set) and all(isinstance(one, str) for one in value)


@_refuse_unknown_keys
@dataclass
class MoeLoraConfig(PeftConfig):
    """A mixture of LoRA experts on every target module.

    The defaults are the paper's (arXiv 2502.15828, Table 12): 20 experts of rank 4, 10 selected.

    Everything is checked here, the options of every part included, before there is a base. A call
    says what a person wants, so a part may be named by its dotted path, and files may be named. A
    configuration that was written down (a file, a mapping that says `peft_type`) may be a
    stranger's: nothing is imported, and no path opened, on its word; see docs/security.md.

    Args:
        r: rank of one expert, >= 1; with `total_rank` the rank of all experts together.
        num_experts: experts per target module, >= 1. One expert is plain LoRA. With site "layer"
            the experts are the target modules themselves, and this number is not read.
        top_k: experts selected per token, 1 <= top_k <= num_experts.
        lora_alpha: the update is scaled by alpha / r, or alpha / sqrt(r) with `use_rslora`; see
            `scale`.
        lora_dropout: dropout on the experts' input, in [0, 1). The router sees the input undropped.
        target_modules: names (suffix match), among which "all-linear" may be, or one regular
            expression; PEFT's LoRA default for the architecture where left out.
        exclude_modules: names or a regular expression to leave out.
        layers_to_transform: layer indexes to adapt; needs `target_modules` as names.
        layers_pattern: name of the layer list where it is not a common one.
        modules_to_save: further modules to train and save whole.
        trainable_token_indices: rows of the input embedding to train, or those of embeddings by
            name, as in PEFT's LoraConfig.
        bias: "none", "all" or "moelora_only": which of the base's biases train.
        site: where a routing decision is taken: "linear" (a router per target module), "block" (one
            router per feed-forward block, whose experts are whole blocks), "layer" (one per decoder
            layer, whose experts are the target modules) or "model".
        site_kwargs: options of the site.
        router: how logits become gates: a name such as "topk" (see docs/methods.md), one that
            `register_router` or an entry point of `moelora.routers` has added, or a dotted path; so
            are the other parts below.
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

    # No fields: they are not saved. Whether the values of the adapter come from its file.
    from_file = False
    # Whether somebody wrote the configuration down, so that nothing is imported or opened for it.
    is_saved = False
    # The shapes that they have there, which `load_adapter` notes so that no others are made.
    stored_shapes = _NO_SHAPES
    # Whether target_modules is a preset's choice, which not every base has all of.
    targets_by_default = False
    # The exponent that the adapter trains with where `gate_rescale` says "auto", once an optimizer
    # has settled it. What was asked for stays as it is; a file has what was used.
    gate_rescale_used = cast("GateRescale | None", None)

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
        if not isinstance(name, str):
            raise ConfigError(f"The preset {shown(name)} must be the name of one.")
        config = cls(**resolve(name, given("presets", name, PRESETS), overrides))
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

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> MoeLoraConfig:
        """PEFT's own, which a file reaches that does not say of which type it is."""
        if kwargs.get("peft_type") is None:
            kwargs["peft_type"] = PEFT_TYPE
        config: MoeLoraConfig = super().from_peft_type(**kwargs)  # type: ignore[no-untyped-call]
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """PEFT's own: the content of a configuration's file.

        Raises:
            AdapterError: it is no JSON object, or too large for one.
        """
        content = read_json(
            Path(path_json_file), remedy="save or download it again", error=AdapterError
        )
        content.pop("runtime_config", None)
        return content

    def __post_init__(self) -> None:
        """Validate and normalise."""
        # JSON knows no members of enums: a type in plain text was written down by somebody.
        self.is_saved = self.peft_type is not None and not isinstance(self.peft_type, PeftType)
        if self.peft_type not in (None, PEFT_TYPE):
            raise ConfigError(f"peft_type={shown(self.peft_type)} must be {PEFT_TYPE!r}.")
        check_mappings(self)
        self._take_paths()
        check_fields(self)
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType(PEFT_TYPE)
        if self.format_version != FORMAT_VERSION:
            raise ConfigError(
                f"format_version={self.format_version} was written by another release of moelora; "
                f"this one reads {FORMAT_VERSION}: install a matching release."
            )
        is_word = str(self.target_modules).lower() == "all-linear"
        if isinstance(self.target_modules, str) and not is_word:
            for key in ("layers_to_transform", "layers_pattern"):
                if getattr(self, key) is not None:
                    raise ConfigError(
                        f"{key} needs target_modules as a list of names or 'all-linear', got the "
                        f"string {shown(self.target_modules)}."
                    )
        # PEFT matches against a set; a sorted list keeps the saved file stable, and both are
        # accepted.
        for key in ("target_modules", "exclude_modules"):
            value = getattr(self, key)
            if value is not None and not isinstance(value, str):
                setattr(self, key, sorted(value))
        check_parts(self)
        check_patterns(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy or a pickle: parts named by dotted path are imported in this program as well."""
        self.__dict__.update(state)
        if not self.is_saved:
            import_parts(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, and in the same order every time: PEFT keeps matched names in sets."""
        content: dict[str, Any] = super().to_dict()
        if self.gate_rescale == "auto" and self.gate_rescale_used is not None:
            content["gate_rescale"] = self.gate_rescale_used
        content = {k: sorted(v) if isinstance(v, set) else v for k, v in content.items()}
        return {**content, "checksum": checksum_of(content)}

    def _take_paths(self) -> None:
        """Read the files that a person names; those that a saved configuration names stay shut."""
        if "path" in self.allocation_kwargs and self.is_saved:
            raise ConfigError(
                "allocation_kwargs['path'] names a file, and none is opened because a saved "
                "configuration says so; put the file's content in its place, as 'modules'."
            )
        if self.allocation == "modules" and "path" in self.allocation_kwargs:
            # So a saved adapter does not need the file, which may change or be gone.
            rest = {key: value for key, value in self.allocation_kwargs.items() if key != "path"}
            content = read_allocation(self.allocation_kwargs["path"])
            self.allocation_kwargs = {**rest, "modules": content}
        named = {"paths", "subtract"} & set(self.init_kwargs)
        if self.is_saved and named and self.peft_version is None:
            raise ConfigError(
                f"init_kwargs[{min(named)!r}] names adapters, and none is opened because a mapping "
                "with peft_type says so; make the configuration by MoeLoraConfig(...)."
            )
        if self.is_saved and (named or self.init == "adapters"):
            lists = {key: self.init_kwargs[key] for key in named}
            kept = {key: SavedPaths(paths) for key, paths in lists.items() if type(paths) is list}
            self.init_kwargs = {**self.init_kwargs, **kept}
            self.from_file = True  # PEFT noted its version, so it has saved the values as well
